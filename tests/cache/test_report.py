"""P6: the report equals the bytes really allocated."""

import pytest
import torch

from sglang_dsv4.cache import CompressedKVCache
from tests.cache.driver import FORMATS, feed, make_spec, random_sequence


def allocated(cache):
    """Every tensor reachable from the storage object, found without asking it."""
    seen, stack, total = set(), [cache.storage], 0
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            key = item.untyped_storage().data_ptr()
            if key not in seen:
                seen.add(key)
                total += item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (tuple, list)):
            stack.extend(item)
        elif hasattr(item, "__dict__"):
            stack.extend(vars(item).values())
    return total


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_total_is_what_is_allocated(formats):
    cache = CompressedKVCache.create(
        make_spec(formats), num_pages=7, max_requests=3, num_window_pages=5
    )
    report = cache.report()
    assert report.total_bytes == allocated(cache)
    assert sum(report.bytes_by_pool.values()) == report.total_bytes
    assert sum(report.bytes_in_row_pools.values()) == report.bytes_by_pool["row_pools"]
    # Per layer: the last group of 64 rows may be part empty; and each group of 64 fp8 rows is padded by 64 bytes.
    padding = 3 * 64 * cache.spec.rows.row_bytes + report.bytes_by_pool["row_pools"] * 64 / 37440
    assert 0 <= report.bytes_in_row_pools["padding"] < padding


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_one_more_page_or_slot_costs_what_the_report_says(formats):
    """Sizes per page and request, against the difference between two caches; 64 pages, so that groups fill."""

    def total(history=64, window=64, slots=3):
        cache = CompressedKVCache.create(
            make_spec(formats), num_pages=history, max_requests=slots, num_window_pages=window
        )
        pools = cache.report().bytes_by_pool
        return sum(size for name, size in pools.items() if name != "rope_tables"), cache.report()

    base, report = total()
    assert total(slots=4)[0] - base == report.stream_bytes_per_request
    padding = 1.002  # fp8 groups are padded by 64 bytes of 37,440
    assert (
        64 * report.history_page_bytes
        <= total(history=128)[0] - base
        <= padding * 64 * report.history_page_bytes
    )
    assert (
        64 * report.window_page_bytes
        <= total(window=128)[0] - base
        <= padding * 64 * report.window_page_bytes
    )


def test_requests_are_listed_with_their_shares():
    cache = CompressedKVCache.create(make_spec(), num_pages=4, max_requests=2)
    request = cache.open()
    feed(cache, [(request, random_sequence(cache.spec, 515), 515)])
    (share,) = cache.report().requests
    assert (share.seq_len, share.tail_lens, share.history_pages) == (515, {4: 3, 128: 3}, 3)
    assert share.window_pages == 2
    assert (
        share.page_bytes
        == 3 * cache.report().history_page_bytes + 2 * cache.report().window_page_bytes
    )
