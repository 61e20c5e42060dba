"""Pool and backend without a server: SGLang's own batches and page tables, our bytes."""

from types import SimpleNamespace

import pytest
import torch

from sglang_dsv4.errors import StalePlanError, UnsupportedError
from tests.cache.driver import FORMATS, make_spec
from tests.plugin.small_server import Sequence, SmallServer, Unattended, alone, make_pool

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_a_prefix_hit_continues_exactly(formats):
    """A second request over the first one's pages, beside a decoding one, in a slot that another request has used."""
    spec = make_spec(formats)
    server, sequence, other = SmallServer(spec, attention=Unattended), Sequence(spec, 900), Sequence(spec, 900, seed=1)
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
        pool.step.plan  # noqa: B018


def test_an_idle_step_writes_nothing():
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    server = SmallServer(make_spec())
    idle = SimpleNamespace(forward_mode=ForwardMode.IDLE)
    server.backend.init_forward_metadata(idle)
    server.backend.forward_core_compressor(torch.zeros(0, 8), idle, 1, None)
    server.backend.forward_c4_indexer(torch.zeros(0, 8), torch.zeros(0, 8), None, idle)
    assert server.backend.forward(torch.zeros(0, 8, 512), None, None, None, idle, attn_sink=None).shape == (0, 8, 512)
    assert not server.pool.step.is_running
