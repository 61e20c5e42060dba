"""The attention backend that SGLang knows as ``dsv4``."""

from collections import Counter
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_dsv4.attention import Attention
from sglang_dsv4.cache import LayerCache
from sglang_dsv4.cache.regions import Part
from sglang_dsv4.errors import StalePlanError, UnsupportedError
from sglang_dsv4.plugin.observe.checks import ServingChecks
from sglang_dsv4.plugin.serve.decode_graphs import DecodeGraphs, MakeAttention, check_captured
from sglang_dsv4.plugin.serve.pool import CompressedTokenToKVPool
from sglang_dsv4.plugin.serve.step_planner import StepPlanner, batch_lengths

# Steps in which a CSA layer's main compressor and indexer take one launch: "eager", "always" or "never". SGLang calls the
# indexer first, and what it chooses depends on its keys; so it is the main compressor that is computed early, on the
# indexer's stream. Eager steps have one stream anyway. A graph would lose the overlap of the two streams.
ONE_LAUNCH = "eager"


class CompressedKVBackend(AttentionBackend):
    """Fills `ExternalKVCache` and attends over it, under SGLang's own DeepSeek-V4 model.

    A step's plan is made from `ForwardBatch` alone. A request starts at a page boundary, after a prefix hit or at 0, and
    the cache needs nothing but the page tables to continue there: there is no state to restore or to clear.

    While a graph is captured SGLang runs a layer's window rows, main compressor and indexer on three streams, and joins them
    before it attends. The three write apart, and the scratch of each is used by one of them; so a layer needs no other order
    than SGLang's, but for the queries of the indexer, whose input another stream computes.

    Args:
        pool (CompressedTokenToKVPool): our pool.
        req_to_token (torch.Tensor): SGLang's table of token slots.
        attention (Attention): for steps of any shape.
        checks (ServingChecks | None): between steps; not together with graphs.
        make (MakeAttention | None): makes attention of a fixed shape, for graphs.

    Attributes:
        steps (Counter[str]): how many steps of each of SGLang's forward modes have run.
    """

    needs_cpu_seq_lens = True

    def __init__(
        self,
        pool: CompressedTokenToKVPool,
        req_to_token: torch.Tensor,
        attention: Attention,
        checks: ServingChecks | None = None,
        make: MakeAttention | None = None,
    ) -> None:
        super().__init__()
        self.token_to_kv_pool = pool
        self.cache = pool.cache
        self.attention = attention
        self.checks = checks
        self.graphs: DecodeGraphs | None = None
        self.steps: Counter[str] = Counter()
        self._make = make
        self._planner = StepPlanner(pool, req_to_token)
        self._step = pool.step
        self._main: dict[int, Any] = {}  # SGLang's main Compressors of CSA layers, as it has passed them

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan a step that runs without a graph."""
        self._step.end()
        self._count(forward_batch.forward_mode)
        if forward_batch.forward_mode.is_idle():
            return
        plan, lengths = self._planner.plan(forward_batch), batch_lengths(forward_batch)
        if self.checks is not None:
            self.checks.before(plan, lengths, forward_batch.rids)
        self.attention.begin(plan, lengths)
        self._step.begin(plan, self.attention)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make what all decode graphs share.

        Raises:
            UnsupportedError: these graphs, or graphs with this attention or with ``--dsv4-check``, are not possible.
        """
        check_captured(max_bs, max_num_tokens, self.attention)
        if self.checks is not None:
            raise UnsupportedError(
                "--dsv4-check: not possible with CUDA graphs, because rows are compared by the host; add --disable-cuda-graph"
            )
        if self._make is None:
            raise UnsupportedError(f"CUDA graphs: expected a CUDA device, got {self.cache.device}")
        self.graphs = DecodeGraphs(self._planner, self._make, max_bs, self.token_to_kv_pool.max_seq_len, self.cache.device)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan a decode step that a graph is about to run, or to be captured from.

        Args:
            forward_batch (Any): SGLang's padded view of a batch; while capturing, a batch of requests that own nothing.
            in_capture (bool): the layers are about to run for a capture.
        """
        if not forward_batch.forward_mode.is_decode():
            raise UnsupportedError(f"CUDA graphs: expected decode steps, got {forward_batch.forward_mode.name}")
        padding = 0
        if not in_capture:
            mode = forward_batch.actual_forward_mode
            self._count(mode)
            padding = forward_batch.batch_size if mode.is_idle() else forward_batch.num_padding
        self._decode_graphs().plan(forward_batch, forward_batch.batch_size - padding)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Start the layers of a step that is being captured, or run once before that."""
        graph = self._decode_graphs().step(forward_batch.batch_size)
        # A plan of its own for every run: each part of a layer is appended once to a plan.
        plan = self.cache.plan(graph.step)
        graph.attention.begin(plan)
        self._step.begin(plan, graph.attention)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of the requests that pad a batch."""
        return 1

    def get_swa_out_cache_loc(self, forward_batch: Any) -> torch.Tensor:
        """What SGLang's model passes on to our pool, which takes window slots from the plan instead."""
        return forward_batch.out_cache_loc

    def forward_core_compressor(self, x: torch.Tensor, forward_batch: Any, layer_id: int, compressor: Any) -> None:
        """Take the new tokens into a layer's main compressor, unless `forward_c4_indexer` has.

        Args:
            x (torch.Tensor): ``[T, hidden]``, the layer's normed input.
            forward_batch (Any): SGLang's ForwardBatch.
            layer_id (int): the layer.
            compressor (Any): SGLang's Compressor, whose weights are used.
        """
        if forward_batch.forward_mode.is_idle():
            return
        if self._step.early is compressor:
            self._step.early = None
            return
        self._main[layer_id] = compressor
        layer = self.token_to_kv_pool.weights.compressor(layer_id, "main", compressor)
        layer.append(self._step.plan, main=compressor.compute_kv_score(x, forward_batch))

    def forward_indexer_compressor(self, x: torch.Tensor, forward_batch: Any, layer_id: int, compressor: Any) -> None:
        """Take the new tokens into a CSA layer's indexer compressor, and into its main one where they take one launch.

        Arguments as in `forward_core_compressor`.
        """
        if not forward_batch.forward_mode.is_idle():
            layer, scores = self._index_scores(x, forward_batch, layer_id, compressor)
            layer.append(self._step.plan, **scores)

    def forward_c4_indexer(
        self,
        x: torch.Tensor,
        q_lora: torch.Tensor,
        c4_indexer: Any,
        forward_batch: Any,
        q_lora_ready: Any = None,
        skip_compressor: bool = False,
        **_: Any,
    ) -> None:
        """Append a CSA layer's index keys, and choose the entries that its queries attend to.

        Args:
            x (torch.Tensor): ``[T, hidden]``, the layer's normed input.
            q_lora (torch.Tensor): ``[T, q_lora_rank]``, the normed query latent.
            c4_indexer (Any): SGLang's C4Indexer, whose weights are used.
            forward_batch (Any): SGLang's ForwardBatch.
            q_lora_ready (Any): event after which another stream has computed ``q_lora``; None where this one has.
            skip_compressor (bool): the index keys were appended already.
        """
        if forward_batch.forward_mode.is_idle():
            return
        layer_id, step = c4_indexer.layer_id, self._step
        layer = self.cache.layers[layer_id]
        if not skip_compressor:
            _, scores = self._index_scores(x, forward_batch, layer_id, c4_indexer.compressor)
            layer.append(step.plan, **scores)
        # Without the scale, which is one positive number for all scores: the order of entries does not depend on it.
        weights = c4_indexer.compute_weights(x, skip_scale=True)
        if q_lora_ready is not None:
            torch.cuda.current_stream().wait_event(q_lora_ready)
        index_q = c4_indexer.wq_b(q_lora)[0].view(-1, c4_indexer.n_heads, c4_indexer.head_dim)
        # Straight into attention's lists; but a kernel is compiled for each width, and in short contexts theirs is the step's.
        place = step.attention.selected_buffer(layer)
        if place is not None and step.attention is self.attention and place.shape[1] != self.cache.spec.index_topk:
            place = None
        rows = layer.select(step.plan, index_q, weights, place, step.attention.numbering)
        step.choose(layer_id, rows)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        attn_sink: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """Attend one layer's queries.

        Args:
            q (torch.Tensor): ``[T, H, 512]``, normed and rotated.
            k (torch.Tensor): unused; the model stored its rows before this call.
            v (torch.Tensor): unused.
            layer (Any): SGLang's RadixAttention, for its layer number.
            forward_batch (Any): SGLang's ForwardBatch.
            save_kv_cache (bool): must be False.
            attn_sink (torch.Tensor): ``[H]``, sink logits.

        Returns:
            torch.Tensor: ``[T, H, 512]`` in ``q.dtype``.
        """
        del k, v
        if forward_batch.forward_mode.is_idle():
            return q.new_empty(q.shape)
        if save_kv_cache:
            raise StalePlanError(f"layer {layer.layer_id}: expected rows stored before attention, got save_kv_cache=True")
        step = self._step
        out = step.attention.run(self.cache.layers[layer.layer_id], q, attn_sink, step.chosen(layer.layer_id))
        if self.checks is not None and layer.layer_id == len(self.cache.layers) - 1:
            self.checks.after(step.plan, batch_lengths(forward_batch), forward_batch.rids)
        return out

    def attention_bytes(self) -> int:
        """Bytes of attention's buffers and of the graphs' plans; they lie beside the cache."""
        graphs = 0 if self.graphs is None else self.graphs.nbytes
        return sum(self.attention.buffers().values()) + graphs

    def _index_scores(
        self, x: torch.Tensor, forward_batch: Any, layer_id: int, compressor: Any
    ) -> tuple[LayerCache, dict[str, torch.Tensor]]:
        """A CSA layer, and the projections of its indexer's compressor; of its main one, too, where they take one launch."""
        step, weights = self._step, self.token_to_kv_pool.weights
        layer = weights.compressor(layer_id, "index", compressor)
        scores = {"index": compressor.compute_kv_score(x, forward_batch)}
        together = ONE_LAUNCH == "always" or (ONE_LAUNCH == "eager" and step.attention is self.attention)
        main = self._main.get(layer_id)  # none in the layer's first step
        if together and main is not None and (layer_id, Part.MAIN) not in step.plan.appended:
            weights.compressor(layer_id, "main", main)
            scores["main"] = main.compute_kv_score(x, forward_batch)
            step.early = main
        return layer, scores

    def _count(self, mode: Any) -> None:
        self.steps[mode.name.lower()] += 1

    def _decode_graphs(self) -> DecodeGraphs:
        if self.graphs is None:
            raise StalePlanError("graphs: expected init_cuda_graph_state before the first capture, got none")
        return self.graphs
