"""Which rows of which tensors a query of a sequence could read: what checks of memory look at."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dsv4_kernels.row_codec import naive_load_rows
from sglang_dsv4.cache.layer import LayerCache
from sglang_dsv4.cache.storage import Capacity
from sglang_dsv4.spec import CacheSpec

ROWS, STREAMS = "I6 rows", "I7 streams"


@dataclass(frozen=True)
class Spans:
    """Sequences at one moment: ``N`` of them.

    Attributes:
        seq_lens (list[int]): tokens of each.
        min_lens (list[int]): the shortest length to which each may be cut back.
        state_slots (list[int]): each one's row in the stream state.
        history (torch.Tensor): ``[N, P]`` int64, as in `dsv4_kernels.step.StepTensors`.
        window (torch.Tensor): ``[N, P]`` int64.
    """

    seq_lens: list[int]
    min_lens: list[int]
    state_slots: list[int]
    history: torch.Tensor
    window: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of one tensor.

    Attributes:
        label (str): of the invariant that wants them finite.
        what (str): kind of row; one kind lies in one tensor of a layer.
        rows (torch.Tensor): ``[R]`` int64, numbers within the kind.
        owners (torch.Tensor): ``[R]`` int64, which sequence could read each.
        indices (torch.Tensor): ``[R]`` int64, which of that sequence's rows of this kind it is: a position, an entry, or a page.
    """

    label: str
    what: str
    rows: torch.Tensor
    owners: torch.Tensor
    indices: torch.Tensor


def page_of(spec: CacheSpec, ratio: int, what: str, row: int) -> tuple[str, int]:
    """Where a row lies: the kind of page and its number; for stream state the request's slot."""
    if what == "window row":
        return "window page", row // spec.page_tokens
    if what in ("entry", "index key"):
        return "history page", row // (spec.page_tokens // ratio)
    if "boundary" in what:
        return "window page", row
    return "state slot", row // _ring(spec, ratio, what)


def load(spec: CacheSpec, cache: LayerCache, what: str, rows: torch.Tensor) -> torch.Tensor:
    """The values of rows of one kind, ``[R, width]`` fp32."""
    storage = cache.storage
    if what == "window row":
        return naive_load_rows(storage.pool, rows, spec.rows)
    if what == "entry":
        return naive_load_rows(storage.pool, cache.num_window_rows + rows, spec.rows)
    if what == "index key":
        assert storage.index_pool is not None, "only CSA layers have index keys"
        return naive_load_rows(storage.index_pool, rows, spec.index_keys)
    if what == "accumulator":
        assert storage.accumulators is not None, "only HCA layers have accumulators"
        return storage.accumulators.flatten(0, 1)[rows].flatten(1)
    part, _, kind = what.partition(" ")
    store = storage.main if part == "main" else storage.index
    assert store is not None, f"the layer has a compressor for {part}"
    return store.streams.flatten(0, 1)[rows] if kind == "stream row" else store.boundary[rows].flatten(1)


def num_rows(spec: CacheSpec, capacity: Capacity, ratio: int, what: str) -> int:
    """How many rows of a kind a layer of this ratio has."""
    if what == "window row":
        return capacity.window_pages * spec.page_tokens
    if what in ("entry", "index key"):
        return capacity.history_pages * (spec.page_tokens // ratio)
    if "boundary" in what:
        return capacity.window_pages
    return capacity.state_slots * _ring(spec, ratio, what)


def _ring(spec: CacheSpec, ratio: int, what: str) -> int:
    return spec.accumulator_rows if what == "accumulator" else spec.stream_rows(ratio)


def reachable(spec: CacheSpec, cache: LayerCache, spans: Spans) -> Iterator[Rows]:
    """Rows that the next query of each sequence could read in one layer, kind by kind."""
    ratio, page_tokens = cache.layer.ratio, spec.page_tokens
    yield _table_rows(
        ROWS,
        "window row",
        spans.window,
        page_tokens,
        [(spec.first_window_position(low), length) for low, length in zip(spans.min_lens, spans.seq_lens, strict=True)],
    )
    if ratio == 0:
        return
    closed = [(0, length // ratio) for length in spans.seq_lens]
    yield _table_rows(ROWS, "entry", spans.history, page_tokens // ratio, closed)
    if cache.layer.indexed:
        yield _table_rows(ROWS, "index key", spans.history, page_tokens // ratio, closed)
    tails = [length % ratio for length in spans.seq_lens]
    if cache.storage.accumulators is not None:
        last = [(length - 1, length) if tail else (0, 0) for length, tail in zip(spans.seq_lens, tails, strict=True)]
        yield _ring_rows("accumulator", spans, spec.accumulator_rows, last)
    kept = [
        (max(length - tail - ratio, length // page_tokens * page_tokens), length)
        for length, tail in zip(spans.seq_lens, tails, strict=True)
    ]
    before = [
        ((length - tail) // page_tokens - 1, (length - tail) // page_tokens)
        if length - tail and (length - tail) % page_tokens == 0
        else (0, 0)
        for length, tail in zip(spans.seq_lens, tails, strict=True)
    ]
    stores = {"main": cache.storage.main, "index": cache.storage.index}
    for part in (part for part, store in stores.items() if store is not None):
        yield _ring_rows(f"{part} stream row", spans, spec.stream_rows(ratio), kept)
        yield _table_rows(STREAMS, f"{part} boundary state", spans.window, 1, before)


def written(spec: CacheSpec, cache: LayerCache, spans: Spans, begins: list[int]) -> Iterator[Rows]:
    """Rows that the last step of each sequence wrote and a query may still read, of it or of another with its prefix.

    Args:
        spec (CacheSpec): the cache's.
        cache (LayerCache): one layer.
        spans (Spans): the sequences after the step.
        begins (list[int]): their lengths before it.
    """
    ratio, page_tokens = cache.layer.ratio, spec.page_tokens
    units = {"window row": 1, "entry": ratio, "index key": ratio}
    for rows in reachable(spec, cache, spans):
        whole_table = rows.what in units or "boundary" in rows.what
        unit = units.get(rows.what, page_tokens if whole_table else 1)
        if not whole_table:
            first = torch.tensor(begins, dtype=torch.int64, device=rows.owners.device)
            new = rows.indices >= first[rows.owners]
            yield Rows(rows.label, rows.what, rows.rows[new], rows.owners[new], rows.indices[new])
            continue
        table = spans.history if rows.what in ("entry", "index key") else spans.window
        per_page = page_tokens // unit
        ranges = [(begin // unit, length // unit) for begin, length in zip(begins, spans.seq_lens, strict=True)]
        yield _table_rows(rows.label, rows.what, table, per_page, ranges)


def _table_rows(label: str, what: str, table: torch.Tensor, per_page: int, ranges: list[tuple[int, int]]) -> Rows:
    owners, indices = _flat(ranges, table.device)
    pages = table[owners, indices // per_page]
    return Rows(label, what, pages * per_page + indices % per_page, owners, indices)


def _ring_rows(what: str, spans: Spans, ring: int, ranges: list[tuple[int, int]]) -> Rows:
    owners, indices = _flat(ranges, spans.window.device)
    slots = torch.tensor(spans.state_slots, dtype=torch.int64, device=owners.device)[owners]
    return Rows(STREAMS, what, slots * ring + indices % ring, owners, indices)


def _flat(ranges: list[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Owners and numbers of ``ranges``, one after the other."""
    counts = torch.tensor([end - begin for begin, end in ranges], dtype=torch.int64)
    begins = torch.tensor([begin for begin, _ in ranges], dtype=torch.int64)
    owners = torch.repeat_interleave(torch.arange(len(ranges)), counts)
    starts = counts.cumsum(0) - counts
    indices = torch.arange(len(owners)) - starts[owners] + begins[owners]
    return owners.to(device), indices.to(device)
