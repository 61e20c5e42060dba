"""P6: the report equals the bytes really allocated."""

from functools import partial

import pytest
import torch

from sglang_dsv4.cache import CompressedKVCache
from tests.cache.driver import FORMATS, feed, make_spec, random_sequence


def allocated(cache):
    """Bytes of every tensor reachable from the cache, found without asking it."""
    # What layers are bound to is the model's, who has allocated it.
    weights = [w for layer in cache.layers for bound in layer._weights.values() for w in vars(bound).values()]
    seen = {w.untyped_storage().data_ptr() for w in weights if isinstance(w, torch.Tensor)}
    stack, total, visited = [cache], 0, set()
    while stack:
        item = stack.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, torch.Tensor):
            key = item.untyped_storage().data_ptr()
            if key not in seen:
                seen.add(key)
                total += item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (tuple, list)):
            stack.extend(item)
        elif isinstance(item, partial):
            stack.extend([*item.args, *item.keywords.values()])
        elif hasattr(item, "__dict__"):
            stack.extend(vars(item).values())
    return total


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_total_is_what_is_allocated(formats):
    cache = CompressedKVCache(make_spec(formats), num_pages=7, max_requests=3, num_window_pages=5)
    report = cache.report()
    assert report.total_bytes == allocated(cache)
    assert sum(report.bytes_by_pool.values()) == report.total_bytes
    assert set(report.bytes_by_pool) == {
        "row_pools",
        "index_keys",
        "stream_state",
        "boundary_state",
        "rope_tables",
        "snapshots",
        "undo",
        "scratch",
    }
    assert sum(report.bytes_in_row_pools.values()) == report.bytes_by_pool["row_pools"]
    # Per layer: the last group of 64 rows may be part empty; and each group of 64 fp8 rows is padded by 64 bytes.
    padding = 3 * 64 * cache.spec.rows.row_bytes + report.bytes_by_pool["row_pools"] * 64 / 37440
    assert 0 <= report.bytes_in_row_pools["padding"] < padding


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_one_more_page_or_slot_costs_what_the_report_says(formats):
    """Sizes per page and request, against the difference between two caches; 64 pages, so that groups fill."""

    def total(history=64, window=64, slots=3):
        cache = CompressedKVCache(make_spec(formats), num_pages=history, max_requests=slots, num_window_pages=window)
        pools = cache.report().bytes_by_pool
        return sum(size for name, size in pools.items() if name != "rope_tables"), cache.report()

    base, report = total()
    assert total(slots=4)[0] - base == report.stream_bytes_per_request
    padding = 1.002  # fp8 groups are padded by 64 bytes of 37,440
    assert 64 * report.history_page_bytes <= total(history=128)[0] - base <= padding * 64 * report.history_page_bytes
    assert 64 * report.window_page_bytes <= total(window=128)[0] - base <= padding * 64 * report.window_page_bytes


def test_requests_are_listed_with_their_shares():
    cache = CompressedKVCache(make_spec(), num_pages=4, max_requests=2)
    request = cache.open()
    feed(cache, [(request, random_sequence(cache.spec, 515), 515)])
    (share,) = cache.report().requests
    assert (share.seq_len, share.tail_lens, share.history_pages) == (515, {4: 3, 128: 3}, 3)
    assert share.tokens_to_flush == {4: 1, 128: 125}
    assert (share.shared_pages, share.own_bytes) == (0, share.page_bytes + share.stream_bytes)
    assert share.window_pages == 2
    assert share.page_bytes == 3 * cache.report().history_page_bytes + 2 * cache.report().window_page_bytes


def test_shared_pages_and_snapshots_are_counted():
    cache = CompressedKVCache(make_spec(), num_pages=6, max_requests=3)
    request = cache.open()
    sequence = random_sequence(cache.spec, 520)
    feed(cache, [(request, sequence, 515)])
    cache.fork(request)
    taken = cache.snapshot(request)
    report = cache.report()
    assert [share.shared_pages for share in report.requests] == [5, 5]
    assert all(share.own_bytes == share.stream_bytes for share in report.requests)
    assert report.bytes_by_pool["snapshots"] == report.stream_bytes_per_request
    assert report.bytes_copied == {
        "fork": report.stream_bytes_per_request,
        "snapshot": report.stream_bytes_per_request,
        "restore": 0,
        "copy_on_write": 0,
        "undo": 0,
    }
    feed(cache, [(request, sequence, 1)])
    # Of the page that starts at 512 no block was closed: window rows 512 .. 514 of three layers. Its boundary state begins four tokens before its end.
    copied = cache.report().bytes_copied["copy_on_write"]
    assert copied == 3 * 3 * 1024
    cache.close(taken)
    assert cache.report().bytes_by_pool["snapshots"] == 0


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_the_sums_are_what_torch_allocated(formats):
    """Everything that a cache in use refers to, with snapshots, found by walking its objects: nothing is left out."""
    cache = CompressedKVCache(make_spec(formats), num_pages=8, max_requests=4)
    sequence = random_sequence(cache.spec, 520)
    requests = [cache.open() for _ in range(2)]
    for request, length in zip(requests, (515, 100), strict=True):
        feed(cache, [(request, sequence, length)])
    twin = cache.fork(requests[0])
    kept = [cache.snapshot(request) for request in (twin, requests[1])]
    report = cache.report()
    assert report.bytes_by_pool["snapshots"] == 2 * report.stream_bytes_per_request
    assert sum(report.bytes_by_pool.values()) == report.total_bytes == allocated(cache)
    cache.close(kept[0])
    assert cache.report().total_bytes == allocated(cache) < report.total_bytes
    # By request: a page is its owner's alone, or shared; each page counted once gives the pages in use.
    shares = cache.report().requests
    own = sum(share.own_bytes - share.stream_bytes for share in shares)
    counts = report.counts
    shared = (
        counts["history_pages_shared"] * report.history_page_bytes + counts["window_pages_shared"] * report.window_page_bytes
    )
    in_use = (counts["history_pages"] - counts["history_pages_free"]) * report.history_page_bytes
    in_use += (counts["window_pages"] - counts["window_pages_free"]) * report.window_page_bytes
    assert own + shared == in_use
    assert sum(share.shared_pages for share in shares) == 2 * 5 + 2  # the fork's, and the snapshot's


def test_the_walk_finds_what_a_report_left_out():
    """The twin: a tensor that nobody counts is found."""
    cache = CompressedKVCache(make_spec(), num_pages=2, max_requests=1)
    assert cache.report().total_bytes == allocated(cache)
    cache.layers[0].forgotten = torch.zeros(3)
    assert cache.report().total_bytes == allocated(cache) - 12


def test_the_text_says_what_is_pending_and_what_is_padding():
    cache = CompressedKVCache(make_spec(("fp8_584", "fp8")), num_pages=4, max_requests=2)
    request = cache.open()
    feed(cache, [(request, random_sequence(cache.spec, 515), 515)])
    report = cache.report()
    text, html = str(report), report._repr_html_()
    for name, value in (
        ("padding", f"{report.bytes_in_row_pools['padding']:,}"),
        ("pending tail rows", "3 of 4, 3 of 128"),
        ("tokens to the next flush", "1, 125"),
        ("bytes that closing frees", f"{report.requests[0].own_bytes:,}"),
    ):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
        assert line.endswith(f" {value}")
        assert f">{value}</td>" in html


def test_the_report_reads_as_text_as_html_and_as_a_dictionary():
    cache = CompressedKVCache(make_spec(), num_pages=2, max_requests=1)
    cache.open()
    report = cache.report()
    assert f"{report.total_bytes:,}" in str(report)
    assert report._repr_html_().count("<tr>") == len(str(report).splitlines())
    assert report.to_dict()["requests"][0]["seq_len"] == 0


def test_checks_run_by_themselves_at_the_level_asked_for():
    from sglang_dsv4.errors import CacheInvariantError

    for checks, found in (("off", False), ("pages", False), ("memory", True)):
        cache = CompressedKVCache(make_spec(), num_pages=2, max_requests=1, checks=checks)
        request = cache.open()
        sequence = random_sequence(cache.spec, 12)
        feed(cache, [(request, sequence, 8)])
        cache.storage.layers[0].pool[request.pages.window[0] * 256].fill_(float("nan"))
        if found:
            with pytest.raises(CacheInvariantError, match="^I6"):
                feed(cache, [(request, sequence, 1)])
        else:
            feed(cache, [(request, sequence, 1)])
    cache = CompressedKVCache(make_spec(), num_pages=2, max_requests=1, checks="pages")
    request = cache.open()
    cache.requests.allocator.history.free.pop()
    with pytest.raises(CacheInvariantError, match="^I1"):
        cache.close(request)
    with pytest.raises(ValueError, match="checks: expected one of"):
        CompressedKVCache(make_spec(), num_pages=2, max_requests=1, checks="on")
