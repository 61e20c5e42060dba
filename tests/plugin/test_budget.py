"""How many tokens fit: by the bytes that a pool really allocates."""

from types import SimpleNamespace

import pytest

from sglang_dsv4.cache.regions import Owner, RegionTable
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.serve.budget import PoolShape, bytes_per_token, shape_of
from tests.cache.driver import FORMATS, make_spec
from tests.plugin.small_server import MODEL, PAGE, PAGES, REQUESTS, make_pool

GIB = 1 << 30


def tenth(tokens):
    return int(tokens * 0.1) // PAGE * PAGE


def make_shape(formats=FORMATS[0], *, on_gpu=False, slots=9, max_seq_len=1 << 20):
    return PoolShape(make_spec(formats), max_seq_len, slots, 64, on_gpu)


@pytest.mark.sglang
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_the_count_is_what_a_pool_allocates(formats):
    spec = make_spec(formats)
    shape = shape_of(spec, MODEL, REQUESTS + 1, "cpu")
    assert make_pool(spec).get_kv_size_bytes() == shape.nbytes(PAGES * PAGE, PAGES * PAGE)
    assert shape.nbytes(PAGES * PAGE, PAGES * PAGE) != shape.nbytes(PAGES * PAGE, 0)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_one_page_more_would_not_fit(formats, on_gpu):
    shape = make_shape(formats, on_gpu=on_gpu)
    for available in (200 << 20, 2 * GIB + 12345, 90 * GIB):
        tokens = shape.most_tokens(available, tenth)
        assert tokens % PAGE == 0
        assert shape.nbytes(tokens, tenth(tokens)) <= available
        assert shape.nbytes(tokens + PAGE, tenth(tokens + PAGE)) > available
    # What is not tokens is small beside 90 GiB: RoPE tables, scratch, streams.
    most = available / bytes_per_token(shape.spec, 0.1)
    assert 0.95 * most < tokens < most


def test_a_request_takes_its_stream_state():
    few, many = make_shape(slots=9), make_shape(slots=1009)
    assert many.nbytes(PAGE, 0) - few.nbytes(PAGE, 0) == 1000 * RegionTable(few.spec).bytes_of(Owner.STATE_SLOT)


def test_scratch_of_kernels_is_counted():
    size = (1 << 20, 1 << 17)
    assert make_shape(on_gpu=True).nbytes(*size) > make_shape().nbytes(*size) + (64 << 20)


def test_too_little_memory_says_what_takes_it():
    with pytest.raises(UnsupportedError, match="memory for the cache: expected at least .* raise"):
        make_shape(slots=4097).most_tokens(50 << 20, tenth)


@pytest.mark.sglang
def test_sglangs_own_sizes_follow():
    """Through our hook, as SGLang calls it."""
    from sglang.srt.model_executor.pool_configurator import DSV4PoolConfigurator

    from sglang_dsv4.plugin.install import pools

    spec = make_spec()
    sizes = object.__new__(DSV4PoolConfigurator)
    vars(sizes).update(
        swa_ratio=0.1,
        swa_cap_tokens=None,
        operator_swa_ratio=None,
        sliding_window_size=128,
        ring_sizes={4: 8, 128: 128},
        _unified=False,
        c4_shrink_factor=1,
        swa_page_size=128,
        c4_ring_size=8,
        disaggregation_mode="null",
        requested_max_running_requests_per_worker=8,
        sglang_dsv4=(spec, SimpleNamespace(context_len=4096, hf_config=MODEL.hf_config), "cpu"),
        bytes_per_full_token=bytes_per_token(spec, 0.1),
    )
    found = pools.fit_pools(None, sizes, GIB, PAGE)
    shape = PoolShape(spec, 4096, 9, MODEL.hf_config.index_n_heads, False)
    tokens = found.max_total_num_tokens
    assert tokens == shape.most_tokens(GIB, tenth)
    assert found.swa_max_total_num_tokens == tenth(tokens)
    assert found.c128_max_total_num_tokens == tokens // 128
