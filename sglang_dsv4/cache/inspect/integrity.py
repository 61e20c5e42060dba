"""Checks that a cache does not contradict itself.

Host bookkeeping, cheap:

* I1 history pages: free and owned pages partition all pages, and each has as many owners as it counts.
* I2 window pages: likewise.
* I3 state slots: likewise.
* I4 coverage: a request owns exactly ``ceil(seq_len / page_tokens)`` history pages.
* I5 window: a request holds the window pages that a query can reach after the deepest roll-back, and none before them.

Device memory, one pass over what requests can read:

* I6 rows: every packed row (window row, entry, index key) that a request needs is finite.
* I7 streams: every row of stream and boundary state that a request needs is finite.
* I8 sums (`sglang_dsv4.cache.inspect.checksums`, on request): every row that a request needs has the checksum that was kept
  when its step wrote it.

What a request needs, also if it is cut back as far as it may be, is said by `sglang_dsv4.cache.regions`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from sglang_dsv4.cache.pages.allocator import PageAllocator
from sglang_dsv4.cache.pages.request import Request, Snapshot
from sglang_dsv4.cache.pages.tables import NULL_PAGE, PageGrant, stack_tables
from sglang_dsv4.cache.regions import Kind, Region, RegionTable, SequenceBatch
from sglang_dsv4.cache.storage import CacheStorage
from sglang_dsv4.errors import CacheInvariantError

ROWS, STREAMS = "I6 rows", "I7 streams"


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
    table: RegionTable,
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
        pages, needed = table.num_pages(holder.seq_len), table.window_pages(holder.seq_len, holder.min_len)
        if len(holder.pages.history) != pages:
            raise CacheInvariantError(f"I4 coverage: {holder}: expected {pages} history pages, got {len(holder.pages.history)}")
        held = [page != NULL_PAGE for page in holder.pages.window]
        if held != [index in needed for index in range(pages)]:
            raise CacheInvariantError(f"I5 window: {holder}: expected pages {needed.start} .. {pages - 1}, got {held}")


def check_memory(storage: CacheStorage, requests: Sequence[Request]) -> None:
    """I6 and I7: reads device memory. Nothing is expected of a damaged request's.

    Raises:
        CacheInvariantError: names the invariant, the request, the layer and the first bad row.
    """
    filled = [request for request in requests if request.seq_len and not request.is_damaged]
    if not filled:
        return
    tables = stack_tables([(request.pages, PageGrant()) for request in filled], storage.layers[0].pool.device)
    batch = SequenceBatch(
        seq_lens=[request.seq_len for request in filled],
        min_lens=[request.min_len for request in filled],
        state_slots=[request.state_slot for request in filled],
        history=tables.history,
        window=tables.window,
    )
    for layer in storage.layers:
        for stored in layer.regions:
            found = batch.needed(stored.region)
            finite = torch.isfinite(stored.values(found.rows)).all(dim=1)
            bad = torch.nonzero(~finite).flatten()
            if len(bad):
                request = filled[int(found.owners[bad[0]])]
                raise CacheInvariantError(
                    f"{label_of(stored.region)}: {request}: layer {stored.region.layer_id}: {describe(stored.region)} "
                    f"{int(found.indices[bad[0]])}: expected finite values, got {len(bad)} of {len(finite)} rows that are not"
                )


def label_of(region: Region) -> str:
    """The invariant that wants a region's rows finite."""
    return ROWS if region.row_format is not None else STREAMS


def describe(region: Region) -> str:
    """What a row of a region is, in words; CSA state is of two compressors."""
    has_parts = region.kind in (Kind.STREAM, Kind.BOUNDARY)
    return f"{region.part.value} {region.kind.value}" if has_parts else region.kind.value
