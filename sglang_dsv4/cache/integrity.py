"""Checks that a cache does not contradict itself.

Host bookkeeping, cheap:
    I1 history pages: free and owned pages partition all pages, and each has as many owners as it counts.
    I2 window pages: likewise.
    I3 state slots: likewise.
    I4 coverage: a request owns exactly ``ceil(seq_len / page_tokens)`` history pages.
    I5 window: a request holds the window pages that a query can reach after the deepest roll-back, and none before them.
Device memory, one pass over what requests can read:
    I6 rows: every entry, index key and window row that a query could reach is finite.
    I7 streams: the kept rows of the open and the previous block, the open block's accumulator, and the boundary state of
       the page before an open page are finite.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch

from dsv4_kernels.row_codec import naive_load_rows
from sglang_dsv4.cache.layer import LayerCache
from sglang_dsv4.cache.pages import NULL_PAGE, PageAllocator, PageGrant, stack_tables
from sglang_dsv4.cache.request import Request, Snapshot
from sglang_dsv4.errors import CacheInvariantError
from sglang_dsv4.spec import CacheSpec


def _check_partition(
    label: str, name: str, free: Sequence[int], owned: Iterable[int], owners: Sequence[int]
) -> None:
    count = Counter(owned)
    for number, expected in enumerate(owners):
        if count[number] != expected:
            raise CacheInvariantError(
                f"{label} {name}: expected {expected} owners of {number} by its count, got {count[number]} that hold it"
            )
    missing = set(range(len(owners))) - set(free) - set(count)
    if missing or len(free) != len(set(free)) or set(free) & set(count):
        raise CacheInvariantError(
            f"{label} {name}: expected free and owned to partition {len(owners)}, got {len(free)} free, {len(count)} owned"
        )


def check_pages(
    spec: CacheSpec,
    allocator: PageAllocator,
    requests: Sequence[Request],
    snapshots: Sequence[Snapshot],
    grants: Sequence[PageGrant],
) -> None:
    """I1 to I5; ``grants`` are what steps under way hold beside the requests' own pages.

    Raises:
        CacheInvariantError: the message starts with the label of the broken invariant.
    """
    holders: list[Request | Snapshot] = [*requests, *snapshots]
    history = [page for holder in holders for page in holder.pages.history]
    window = [page for holder in holders for page in holder.pages.window if page != NULL_PAGE]
    history += [page for grant in grants for page in grant.history_pages()]
    window += [page for grant in grants for page in grant.window_pages()]
    _check_partition(
        "I1", "history pages", allocator.history.free, history, allocator.history.owners
    )
    _check_partition("I2", "window pages", allocator.window.free, window, allocator.window.owners)
    slots = [request.state_slot for request in requests]
    _check_partition("I3", "state slots", allocator.slots.free, slots, allocator.slots.owners)
    for holder in holders:
        pages = -(-holder.seq_len // spec.page_tokens)
        if len(holder.pages.history) != pages:
            raise CacheInvariantError(
                f"I4 coverage: {holder}: expected {pages} history pages, got {len(holder.pages.history)}"
            )
        first = spec.first_window_position(holder.min_len) // spec.page_tokens
        held = [page != NULL_PAGE for page in holder.pages.window]
        if held != [index >= first for index in range(pages)]:
            raise CacheInvariantError(
                f"I5 window: {holder}: expected pages {first} .. {pages - 1}, got {held}"
            )


def check_memory(
    spec: CacheSpec, layers: Sequence[LayerCache], num_window_rows: int, requests: Sequence[Request]
) -> None:
    """I6 and I7: reads device memory.

    Raises:
        CacheInvariantError: names the invariant, the request, the layer and the first bad row.
    """
    for request in requests:
        if request.seq_len:
            for cache in layers:
                for label, what, values in _reachable(spec, cache, num_window_rows, request):
                    bad = torch.nonzero(~torch.isfinite(values).flatten(1).all(dim=1)).flatten()
                    if len(bad):
                        raise CacheInvariantError(
                            f"{label}: {request}: layer {cache.layer.layer_id}: {what} {int(bad[0])}: expected finite "
                            f"values, got {len(bad)} of {len(values)} that are not"
                        )


def _reachable(
    spec: CacheSpec, cache: LayerCache, num_window_rows: int, request: Request
) -> Iterator[tuple[str, str, torch.Tensor]]:
    storage, ratio, page_tokens = cache.storage, cache.layer.ratio, spec.page_tokens
    device = storage.pool.device
    tables = stack_tables([(request.pages, PageGrant((), ()))], device)
    positions = torch.arange(
        spec.first_window_position(request.min_len), request.seq_len, device=device
    )
    rows = tables.window[0, positions // page_tokens] * page_tokens + positions % page_tokens
    yield "I6 rows", "window row", naive_load_rows(storage.pool, rows, spec.rows)
    if ratio == 0:
        return
    per_page = page_tokens // ratio
    entries = torch.arange(request.num_entries(ratio), device=device)
    rows = tables.history[0, entries // per_page] * per_page + entries % per_page
    yield "I6 rows", "entry", naive_load_rows(storage.pool, num_window_rows + rows, spec.rows)
    if storage.index_pool is not None:
        yield "I6 rows", "index key", naive_load_rows(storage.index_pool, rows, spec.index_keys)
    slot, tail = request.state_slot, request.tail_len(ratio)
    if storage.accumulators is not None and tail:
        ring = storage.accumulators.shape[1]
        yield (
            "I7 streams",
            "accumulator part",
            storage.accumulators[slot, (request.seq_len - 1) % ring],
        )
    first_row = max(request.seq_len - tail - ratio, request.seq_len // page_tokens * page_tokens)
    for store in (storage.main, storage.index):
        if store is not None:
            kept = torch.arange(first_row, request.seq_len, device=device) % store.streams.shape[1]
            yield "I7 streams", "stream row", store.streams[slot, kept]
            before = (request.seq_len - tail) // page_tokens - 1
            if before >= 0 and (request.seq_len - tail) % page_tokens == 0:
                yield "I7 streams", "boundary row", store.boundary[tables.window[0, before]]
