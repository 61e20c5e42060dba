"""Checks that a cache does not contradict itself.

Host bookkeeping, cheap:

* I1 history pages: free and owned pages partition all pages, and each has as many owners as it counts.
* I2 window pages: likewise.
* I3 state slots: likewise.
* I4 coverage: a request owns exactly ``ceil(seq_len / page_tokens)`` history pages.
* I5 window: a request holds the window pages that a query can reach after the deepest roll-back, and none before them.

Device memory, one pass over what requests can read:

* I6 rows: every entry, index key and window row that a query could reach is finite.
* I7 streams: the kept rows of the open and the previous block, the open block's accumulator, and the boundary state of
  the page before an open page are finite.
* I8 sums (`sglang_dsv4.cache.inspect.checksums`, where it was asked for): every row that a query could read has the checksum that
  was kept when its step wrote it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from sglang_dsv4.cache.inspect.reach import Spans, load, reachable
from sglang_dsv4.cache.layer import LayerCache
from sglang_dsv4.cache.pages.allocator import NULL_PAGE, PageAllocator, PageGrant, stack_tables
from sglang_dsv4.cache.pages.request import Request, Snapshot
from sglang_dsv4.errors import CacheInvariantError
from sglang_dsv4.spec import CacheSpec


def _check_partition(label: str, name: str, free: Sequence[int], owned: Iterable[int], owners: Sequence[int]) -> None:
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
    _check_partition("I1", "history pages", allocator.history.free, history, allocator.history.owners)
    _check_partition("I2", "window pages", allocator.window.free, window, allocator.window.owners)
    slots = [request.state_slot for request in requests]
    _check_partition("I3", "state slots", allocator.slots.free, slots, allocator.slots.owners)
    for holder in holders:
        pages = -(-holder.seq_len // spec.page_tokens)
        if len(holder.pages.history) != pages:
            raise CacheInvariantError(f"I4 coverage: {holder}: expected {pages} history pages, got {len(holder.pages.history)}")
        first = spec.first_window_position(holder.min_len) // spec.page_tokens
        held = [page != NULL_PAGE for page in holder.pages.window]
        if held != [index >= first for index in range(pages)]:
            raise CacheInvariantError(f"I5 window: {holder}: expected pages {first} .. {pages - 1}, got {held}")


def check_memory(spec: CacheSpec, layers: Sequence[LayerCache], requests: Sequence[Request]) -> None:
    """I6 and I7: reads device memory.

    Raises:
        CacheInvariantError: names the invariant, the request, the layer and the first bad row.
    """
    filled = [request for request in requests if request.seq_len]
    if not filled:
        return
    tables = stack_tables([(request.pages, PageGrant((), ())) for request in filled], layers[0].storage.pool.device)
    spans = Spans(
        seq_lens=[request.seq_len for request in filled],
        min_lens=[request.min_len for request in filled],
        state_slots=[request.state_slot for request in filled],
        history=tables.history,
        window=tables.window,
    )
    for cache in layers:
        for rows in reachable(spec, cache, spans):
            finite = torch.isfinite(load(spec, cache, rows.what, rows.rows)).all(dim=1)
            bad = torch.nonzero(~finite).flatten()
            if len(bad):
                request = filled[int(rows.owners[bad[0]])]
                raise CacheInvariantError(
                    f"{rows.label}: {request}: layer {cache.layer.layer_id}: {rows.what} {int(rows.indices[bad[0]])}: "
                    f"expected finite values, got {len(bad)} of {len(finite)} rows that are not"
                )
