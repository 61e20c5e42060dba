"""SGLang's model runner in small: our pool and backend, static buffers, and three layers that call the backend as SGLang's
model does. On a GPU decode steps are captured and replayed; on a CPU the layers of a replay are run instead."""

from inspect import signature
from types import SimpleNamespace

import torch

from dsv4_kernels import memory
from dsv4_kernels.row_codec import naive_load_rows
from dsv4_kernels.sparse_attention.bound import exact
from sglang_dsv4.attention import EagerAttention, make_attention
from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.check.bare_pool import bare_pool, model_config
from tests.cache.driver import feed, random_sequence, random_weights, reachable_bytes, table_bytes

PAGES, PAGE, REQUESTS, LONGEST = 24, 256, 6, 1024
INDEX_HEADS = 8
HANDED_ON = (
    "can_run_decode_cuda_graph",
    "kv_loc_cols",
    "kv_loc_plan",
    "lora_ids",
    "max_seq_len_host",
    "max_seq_len_override",
    "out_cache_loc_virtual",
)
MODEL = model_config(LONGEST, INDEX_HEADS)


def make_pool(spec, device="cpu", **changed):
    """Our pool; what nobody has written in it is NaN."""
    memory.set_poison(True)
    return bare_pool(spec, MODEL, PAGES, REQUESTS, device, **changed)


def alone(spec, sequence, length, device="cpu"):
    """The bytes that a sequence of its own on a cold cache could reach."""
    cache = CompressedKVCache(spec, num_pages=8, max_requests=1, device=device)
    request = cache.open()
    feed(cache, [(request, sequence.inputs, length)])
    return reachable_bytes(cache, request)


class Sequence:
    """What a model would compute of a sequence: per token and layer, cache inputs and queries."""

    def __init__(self, spec, num_tokens, seed=0, heads=4, device="cpu"):
        generator = torch.Generator().manual_seed(1000 + seed)
        layers = len(spec.layers)

        def random(*shape):
            return torch.randn(*shape, generator=generator)

        self.inputs = random_sequence(spec, num_tokens, seed).to(device)
        self.q = random(layers, num_tokens, heads, 512).to(device, torch.bfloat16)
        self.index_q = random(num_tokens, INDEX_HEADS, 128).to(device, torch.bfloat16)
        self.index_weights = random(num_tokens, INDEX_HEADS).to(device, torch.bfloat16)


def compressor(given, norm_weight, slot_bias):
    """SGLang's Compressor as far as the backend reads it, or the K=V projection with its norm; its input is ``given``."""
    return SimpleNamespace(
        given=given,
        compute_kv_score=lambda x, batch: given[: len(x)],
        ape=slot_bias,
        head_dim=len(norm_weight),
        norm=SimpleNamespace(weight=norm_weight, variance_epsilon=1e-6),
    )


class Layers:
    """The model: inputs of a step at fixed addresses, and calls of the backend in SGLang's order."""

    def __init__(self, spec, max_tokens, heads, device):
        self.spec, self.device = spec, device
        self.sink = torch.linspace(-1, 1, heads, device=device)
        self.parts = []
        for layer, weights in zip(spec.layers, random_weights(spec), strict=True):
            found = {}
            for part, (norm_weight, slot_bias) in weights.items():
                width = len(norm_weight) * (1 if part == "window" else 4 if layer.overlap else 2)
                given = torch.zeros(max_tokens, width, device=device)
                found[part] = compressor(given, norm_weight.to(device), None if slot_bias is None else slot_bias.to(device))
            self.parts.append(found)
        layers = len(spec.layers)
        self.q = torch.zeros(layers, max_tokens, heads, 512, dtype=torch.bfloat16, device=device)
        self.index_q = torch.zeros(max_tokens, INDEX_HEADS, 128, dtype=torch.bfloat16, device=device)
        self.index_weights = torch.zeros(max_tokens, INDEX_HEADS, dtype=torch.bfloat16, device=device)

    def load(self, items):
        """A step's inputs: ``items`` are (slot, sequence, begin, end)."""
        at = 0
        for _, sequence, begin, end in items:
            to, of = slice(at, at + end - begin), slice(begin, end)
            for layer_id, parts in enumerate(self.parts):
                for part, buffers in parts.items():
                    buffers.given[to].copy_(sequence.inputs.cut(layer_id, part, begin, end).values)
            self.q[:, to].copy_(sequence.q[:, of])
            self.index_q[to].copy_(sequence.index_q[of])
            self.index_weights[to].copy_(sequence.index_weights[of])
            at = to.stop

    def run(self, backend, batch, num_tokens, streams=None, wait=True):
        """Every layer; ``streams`` as SGLang's model uses them while a graph is captured.

        Returns:
            list: per layer the attention's result and the chosen rows, at the addresses that a graph will write again.
        """
        found = []
        for layer_id in range(len(self.spec.layers)):
            if streams is None:
                chosen = self._prepare(backend, batch, layer_id, num_tokens)
            else:
                chosen = self._prepare_on(streams, backend, batch, layer_id, num_tokens, wait)
            q = self.q[layer_id, :num_tokens]
            out = backend.forward(
                q,
                q,
                q,
                SimpleNamespace(layer_id=layer_id),
                batch,
                save_kv_cache=False,
                compress_ratio=self.spec.layers[layer_id].ratio,
                attn_sink=self.sink,
            )
            found.append((out, chosen))
        return found

    def _prepare(self, backend, batch, layer_id, count):
        x = self.index_q[:count]
        self._store(backend, batch, layer_id, count)
        chosen = self._index(backend, batch, layer_id, count, self.index_q[:count].flatten(1), None)
        if self.spec.layers[layer_id].ratio:
            backend.forward_core_compressor(x, batch, layer_id, self.parts[layer_id]["main"])
        return chosen

    def _prepare_on(self, streams, backend, batch, layer_id, count, wait):
        current = torch.cuda.current_stream()
        kv, compressor, indexer = streams
        for stream in streams:
            stream.wait_stream(current)
        # Late and different before: an indexer that does not wait for it chooses other entries.
        q_lora = torch.zeros_like(self.index_q[:count]).flatten(1)
        torch.cuda._sleep(200_000)
        q_lora.copy_(self.index_q[:count].flatten(1))
        ready = current.record_event() if wait else None
        with torch.cuda.stream(indexer):
            chosen = self._index(backend, batch, layer_id, count, q_lora, ready)
        with torch.cuda.stream(kv):
            self._store(backend, batch, layer_id, count)
        if self.spec.layers[layer_id].ratio:
            with torch.cuda.stream(compressor):
                backend.forward_core_compressor(self.index_q[:count], batch, layer_id, self.parts[layer_id]["main"])
        for stream in streams:
            current.wait_stream(stream)
        return chosen

    def _store(self, backend, batch, layer_id, count):
        window = self.parts[layer_id]["window"]
        backend.token_to_kv_pool.set_swa_key_buffer_radix_fused_norm_rope(
            layer_id=layer_id,
            swa_loc=backend.get_swa_out_cache_loc(batch),
            kv=window.given[:count],
            kv_weight=window.norm.weight.data,
            eps=1e-6,
            freqs_cis=None,
            positions=None,
        )

    def indexer(self, layer_id):
        """SGLang's C4Indexer of a layer."""
        return SimpleNamespace(
            layer_id=layer_id,
            n_heads=INDEX_HEADS,
            head_dim=128,
            wq_b=lambda given: (given, None),
            compute_weights=lambda x, skip_scale: self.index_weights[: len(x)],
            compressor=self.parts[layer_id]["index"],
        )

    def _index(self, backend, batch, layer_id, count, q_lora, ready):
        if not self.spec.layers[layer_id].indexed:
            return None
        backend.forward_c4_indexer(
            x=self.index_q[:count],
            q_lora=q_lora,
            forward_batch=batch,
            c4_indexer=self.indexer(layer_id),
            alt_streams=None,
            enable_multi_stream=ready is not None,
            q_lora_ready=ready,
            skip_compressor=False,
        )
        _, chosen = backend.token_to_kv_pool.step._selected
        return chosen


class Unattended(EagerAttention):
    """For tests of what is stored: no query attends to anything."""

    def run(self, layer, q, sink, selected=None, *, undo_rope=False):
        return q


class SmallServer:
    """One pool and one backend, fed with steps as SGLang's runners feed them."""

    def __init__(self, spec, device="cpu", heads=4, attention=None, max_tokens=1200, make_checks=None):
        from sglang_dsv4.plugin.serve.backend import CompressedKVBackend

        self.spec, self.device = spec, device
        self.pool = make_pool(spec, device)
        self.cache = self.pool.cache
        self.req_to_token = torch.zeros(REQUESTS + 1, LONGEST + 4, dtype=torch.int32, device=device)
        self.layers = Layers(spec, max_tokens, heads, device)

        def make(fixed=None, like=None):
            if attention is Unattended:
                return Unattended(self.cache)
            found = make_attention(attention, self.cache, heads, fixed=fixed, like=like)[0]
            if found.name == "eager" and device == "cpu":  # there is no graph that could not hold it
                found.__class__ = type("Captured", (type(found),), {"capture_fault": ""})
            return found

        checks = None if make_checks is None else make_checks(self.cache)
        self.backend = CompressedKVBackend(self.pool, self.req_to_token, make(), checks, make)
        self.graphs = {}
        self.buffers = None

    def assign(self, slot, pages):
        """Give a request pages of tokens."""
        self.req_to_token[slot].zero_()
        for index, page in enumerate(pages):
            slots = PAGE * page + torch.arange(PAGE, dtype=torch.int32, device=self.device)
            self.req_to_token[slot, PAGE * index : PAGE * (index + 1)] = slots

    def batch(self, items, decode):
        """SGLang's ForwardBatch of a step, as far as the backend reads it."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        ends = torch.tensor([end for *_, end in items])
        counts = [end - begin for *_, begin, end in items]
        return SimpleNamespace(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            batch_size=len(items),
            seq_lens=ends.to(self.device),
            seq_lens_cpu=ends,
            seq_lens_sum=int(ends.sum()),
            extend_seq_lens=None if decode else torch.tensor(counts, dtype=torch.int32, device=self.device),
            extend_seq_lens_cpu=None if decode else counts,
            positions=torch.cat([torch.arange(b, e) for *_, b, e in items]).to(self.device),
            req_pool_indices=torch.tensor([slot for slot, *_ in items], device=self.device),
            out_cache_loc=None,
            spec_info=None,
            rids=[f"r{slot}" for slot, *_ in items],
            # Of no concern to the backend; SGLang hands them on.
            **dict.fromkeys(HANDED_ON),
        )

    def step(self, items, decode=False):
        """A step without a graph."""
        batch = self.batch(items, decode)
        self.layers.load(items)
        self.backend.init_forward_metadata(batch)
        return self.layers.run(self.backend, batch, len(batch.positions))

    def capture(self, sizes, wait=True):
        """Graphs of decode steps, the largest first."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        most = max(sizes)
        fill = self.backend.get_cuda_graph_seq_len_fill_value()
        self.backend.init_cuda_graph_state(most, most)
        self.buffers = SimpleNamespace(
            seq_lens=torch.full((most,), fill, device=self.device),
            seq_lens_cpu=torch.full((most,), fill),
            req_pool_indices=torch.zeros(most, dtype=torch.int64, device=self.device),
            positions=torch.zeros(most, dtype=torch.int64, device=self.device),
            input_ids=torch.zeros(most, dtype=torch.int64, device=self.device),
            encoder_lens=None,
            mamba_track_indices=None,
        )
        for count in sorted(sizes, reverse=True):
            batch = SimpleNamespace(
                forward_mode=ForwardMode.DECODE,
                batch_size=count,
                out_cache_loc=None,
                **{
                    name: getattr(self.buffers, name)[:count]
                    for name in ("seq_lens", "seq_lens_cpu", "req_pool_indices", "positions")
                },
            )
            self.backend.init_forward_metadata_out_graph(batch, in_capture=True)
            self.graphs[count] = self._capture_one(batch, count, wait)

    def _capture_one(self, batch, count, wait):
        streams = None if self.device == "cpu" else [torch.cuda.Stream(self.device) for _ in range(3)]

        def run_once():
            self.backend.init_forward_metadata_in_graph(batch)
            return self.layers.run(self.backend, batch, count, streams, wait)

        for _ in range(2):
            run_once()
            self.backend.on_after_cuda_graph_warmup()
        if self.device == "cpu":
            return run_once
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run_once()

        def replay():
            graph.replay()
            return found

        return replay

    def replay(self, items):
        """A decode step of the smallest captured size that holds it."""
        self.load_batch(items)
        return self.graphs[self._size(items)]()

    def load_batch(self, items):
        """What SGLang does before a replay."""
        self.backend.init_forward_metadata_out_graph(self.view(items))

    def view(self, items):
        """SGLang's padded view of a decode step, after its buffers are filled."""
        from sglang.srt.model_executor.runner.decode_cuda_graph_runner import build_replay_fb_view

        batch, count, real = self.batch(items, True), self._size(items), len(items)
        fill = self.backend.get_cuda_graph_seq_len_fill_value()
        for name, rest in (("seq_lens", fill), ("seq_lens_cpu", fill), ("req_pool_indices", 0), ("positions", 0)):
            buffer = getattr(self.buffers, name)
            buffer[:real].copy_(getattr(batch, name))
            buffer[real:count].fill_(rest)
        self.layers.load(items)
        counts = (
            {"global_num_tokens_cpu": None} if "global_num_tokens_cpu" in signature(build_replay_fb_view).parameters else {}
        )
        return build_replay_fb_view(
            **counts,
            forward_batch=batch,
            buffers=self.buffers,
            bs=count,
            raw_bs=real,
            num_tokens=count,
            seq_len_fill_value=fill,
            capture_forward_mode=batch.forward_mode,
            is_encoder_decoder=False,
        )

    def _size(self, items):
        return min(size for size in self.graphs if size >= len(items))

    def tables(self, slot, seq_len):
        """History and window pages of a request, on the CPU."""
        pages = self.req_to_token[slot, : -(-seq_len // PAGE) * PAGE : PAGE].long()
        window = self.pool.translate_loc_from_full_to_swa(pages)
        return (pages // PAGE).cpu(), (window // PAGE).cpu()

    def bytes_of(self, slot, seq_len):
        """All that a query of a request could reach."""
        return table_bytes(self.cache, seq_len, *self.tables(slot, seq_len))

    def entries(self, item, chosen):
        """The chosen rows of the last token of ``item``: what is behind them belongs to its window."""
        return chosen[: min(item[3] // 4, self.spec.index_topk)]

    def expected(self, layer_id, item, chosen):
        """Attention of the last token of ``item`` in fp64, over the rows that it should list; ``chosen`` in CSA layers."""
        slot, sequence, _, end = item
        history, window = self.tables(slot, end)
        positions = torch.arange(max(0, end - self.spec.window), end)
        rows = window[positions // PAGE] * PAGE + positions % PAGE
        layer = self.spec.layers[layer_id]
        if layer.ratio and not layer.indexed:
            entries, per_page = torch.arange(end // layer.ratio), PAGE // layer.ratio
            slots = history[entries // per_page] * per_page + entries % per_page
            rows = torch.cat([rows, slots + self.cache.storage.num_window_rows])
        if chosen is not None:
            rows = torch.cat([rows, self.entries(item, chosen).long().cpu()])
        pool = self.cache.layers[layer_id].pool
        values = naive_load_rows(pool, rows.to(self.device), self.spec.rows)
        q = sequence.q[layer_id, end - 1]
        return exact(q, values, self.layers.sink, 512**-0.5)
