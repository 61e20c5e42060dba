"""Pool and backend without a server: SGLang's own batches and page tables, our bytes."""

from types import SimpleNamespace

import pytest
import torch

from dsv4_kernels.memory import set_poison
from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.errors import StalePlanError, UnsupportedError
from tests.cache.driver import FORMATS, append_all, feed, make_spec, random_sequence, reachable_bytes, table_bytes

pytestmark = pytest.mark.sglang

TOKENS = 4096
REQUESTS = 3


MODEL = SimpleNamespace(context_len=2048, hf_config=SimpleNamespace(index_n_heads=8))


def make_pool(spec, **changed):
    from sglang_dsv4.plugin.serve.pool import pool_factory

    native = {
        "max_num_reqs": REQUESTS,
        "num_req_slots": REQUESTS + 1,
        "swa_size": TOKENS,
        "c4_size": TOKENS // 4,
        "c128_size": TOKENS // 128,
        "c4_state_pool_size": 0,
        "c128_state_pool_size": 0,
        "page_size": 256,
        "swa_page_size": 256,
        "sliding_window": 128,
        "dtype": torch.float8_e4m3fn,
        "c4_state_dtype": torch.float32,
        "c128_state_dtype": torch.float32,
        "qk_nope_head_dim": 448,
        "qk_rope_head_dim": 64,
        "indexer_head_dim": 128,
        "layer_num": 3,
        "device": "cpu",
        "enable_memory_saver": False,
        "compression_ratios": [0, 4, 128],
    }
    set_poison(True)
    pool = pool_factory(spec, MODEL)(**{**native, **changed})
    # SGLang's allocators number pages apart; here window pages are history pages in reverse.
    full = torch.arange(TOKENS + 256)
    pool.register_mapping((TOKENS // 256 - full // 256).clamp_min(0) * 256 + full % 256)
    return pool


class Server:
    """What SGLang's scheduler would keep: a slot table per request, and one backend."""

    def __init__(self, spec):
        from sglang_dsv4.attention import EagerAttention
        from sglang_dsv4.plugin.serve.backend import CompressedKVBackend

        self.pool = make_pool(spec)
        self.req_to_token = torch.zeros(REQUESTS + 1, 2048, dtype=torch.int32)
        self.backend = CompressedKVBackend(self.pool, self.req_to_token, EagerAttention(self.pool.cache))

    def assign(self, slot, pages):
        self.req_to_token[slot].zero_()
        for index, page in enumerate(pages):
            self.req_to_token[slot, 256 * index : 256 * index + 256] = 256 * page + torch.arange(256)

    def step(self, items, decode=False):
        """``items``: (slot, inputs, begin, end) per request."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        lens = torch.tensor([end for *_, end in items])
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            seq_lens=lens,
            seq_lens_cpu=lens,
            extend_seq_lens=None if decode else torch.tensor([end - begin for *_, begin, end in items], dtype=torch.int32),
            positions=torch.cat([torch.arange(begin, end) for *_, begin, end in items]),
            req_pool_indices=torch.tensor([slot for slot, *_ in items]),
            out_cache_loc=None,
            rids=[f"r{slot}" for slot, *_ in items],
        )
        self.backend.init_forward_metadata(batch)
        append_all(self.pool.cache, self.pool.current_plan(), [(inputs, begin, end) for _, inputs, begin, end in items])
        return batch

    def bytes_of(self, slot, seq_len):
        pages = self.req_to_token[slot, : -(-seq_len // 256) * 256 : 256].long()
        window = self.pool.translate_loc_from_full_to_swa(pages)
        return table_bytes(self.pool.cache, seq_len, pages // 256, window // 256)


def alone(spec, sequence, length):
    cache = CompressedKVCache(spec, num_pages=8, max_requests=1)
    request = cache.open()
    feed(cache, [(request, sequence, length)])
    return reachable_bytes(cache, request)


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_a_prefix_hit_continues_exactly(formats):
    """A second request over the first one's pages, beside a decoding one, in a slot that another request has used."""
    spec = make_spec(formats)
    server, sequence, other = (Server(spec), random_sequence(spec, 900), random_sequence(spec, 900, seed=1))
    server.assign(1, [3, 5, 7])
    server.assign(2, [9, 10, 11])
    server.step([(1, sequence, 0, 600), (2, other, 0, 303)])
    assert server.bytes_of(1, 600) == alone(spec, sequence, 600)
    server.assign(2, [3, 5, 12])
    server.step([(2, sequence, 512, 515), (1, sequence, 600, 601)])
    for length in range(515, 530):
        server.step([(2, sequence, length, length + 1), (1, sequence, length + 86, length + 87)], decode=True)
    assert server.bytes_of(2, 530) == alone(spec, sequence, 530)
    assert server.bytes_of(1, 616) == alone(spec, sequence, 616)


def test_native_buffers_are_left_out_and_reading_one_says_so():
    pool = make_pool(make_spec())
    report = pool.cache.report()
    assert pool.get_kv_size_bytes() == report.total_bytes
    assert pool.mem_usage == report.total_bytes / 2**30
    for read in (
        lambda: pool.swa_kv_pool.kv_buffer,
        lambda: pool.c4_kv_pool.page_size,
        lambda: pool.get_index_k_page_size(),
        lambda: pool.compress_state_pools[1].kv_score_buffer,
    ):
        with pytest.raises(UnsupportedError, match="not allocated, CompressedKVCache holds the rows"):
            read()


def test_another_page_size_is_refused():
    with pytest.raises(UnsupportedError, match="page size: expected 256, got 64"):
        make_pool(make_spec(), page_size=64)


def test_a_layer_before_its_step_is_refused():
    pool = make_pool(make_spec())
    with pytest.raises(StalePlanError, match="expected init_forward_metadata before the first layer"):
        pool.current_plan()


def test_an_idle_step_writes_nothing():
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    server = Server(make_spec())
    idle = SimpleNamespace(forward_mode=ForwardMode.IDLE)
    server.backend.init_forward_metadata(idle)
    server.backend.forward_core_compressor(torch.zeros(0, 8), idle, 1, None)
    server.backend.forward_c4_indexer(torch.zeros(0, 8), torch.zeros(0, 8), None, idle)
    assert server.backend.forward(torch.zeros(0, 8, 512), None, None, None, idle, attn_sink=None).shape == (0, 8, 512)
    assert server.pool.plan is None
