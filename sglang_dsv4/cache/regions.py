"""The one table of what a layer holds, and of what a sequence needs of it.

A `Region` is one kind of row of one layer: where its rows lie, and which of them the next token of a sequence reads. Storage,
report, copy-on-write, undo, save and load, checksums and integrity iterate over the table; none of them has a rule of its own.
A new kind of row is one `Kind`, one entry of `layer_regions` and its rule in `Region.written` and `Region.reads`.

Rows of a region are numbered within the sequence by an *index*: a position for window rows, stream rows and accumulators, an
entry number for entries and index keys. Boundary rows exist for the last ``ratio`` tokens of each page and are counted through.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from math import prod

import torch

from dsv4_kernels.layout import RowFormat
from dsv4_kernels.streams import CSA_PARTS
from sglang_dsv4.spec import CacheSpec, LayerSpec

_FP32_BYTES = 4
Ranges = tuple[range, ...]


class Kind(Enum):
    """Kinds of rows; the value names one in messages."""

    WINDOW_ROW = "window row"
    ENTRY = "entry"
    INDEX_KEY = "index key"
    BOUNDARY = "boundary row"
    STREAM = "stream row"
    ACCUMULATOR = "accumulator"


class Part(StrEnum):
    """Which projection of the layer the rows come from."""

    WINDOW = "window"
    MAIN = "main"
    INDEX = "index"


class Owner(Enum):
    """What rows belong to; a history or window page is shared by the sequences with its tokens, a state slot is one request's."""

    HISTORY_PAGE = "history page"
    WINDOW_PAGE = "window page"
    STATE_SLOT = "state slot"


@dataclass(frozen=True)
class Region:
    """One kind of row of one layer.

    Attributes:
        layer_id (int): the layer.
        kind (Kind): what a row is.
        part (Part): the projection it comes from.
        owner (Owner): what holds it.
        rows_per_owner (int): rows of a page, or of a slot's ring: row ``index % rows_per_owner``.
        ratio (int): tokens per entry of the layer; 0 in a window-only layer.
        page_tokens (int): tokens per page.
        window (int): window rows that a query attends to, its own included.
        row_format (RowFormat | None): how a row is packed; None for fp32 state.
        shape (tuple[int, ...]): values of a row.
    """

    layer_id: int
    kind: Kind
    part: Part
    owner: Owner
    rows_per_owner: int
    ratio: int
    page_tokens: int
    window: int
    row_format: RowFormat | None
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Unique within a cache, for example ``layer.3.stream.index``."""
        return f"layer.{self.layer_id}.{self.kind.name.lower()}.{self.part.value}"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, without the padding of a group of rows."""
        return self.row_format.row_bytes if self.row_format else prod(self.shape) * _FP32_BYTES

    @property
    def places(self) -> tuple[Kind, int]:
        """Regions with equal places number their rows alike: in one sequence, an index has the same row number in all of them."""
        return self.kind, self.ratio

    def written(self, seq_len: int) -> int:
        """How many rows ``seq_len`` tokens have written: those of index ``0 .. written - 1``."""
        match self.kind:
            case Kind.ENTRY | Kind.INDEX_KEY:
                return seq_len // self.ratio
            case Kind.BOUNDARY:
                pages, offset = divmod(seq_len, self.page_tokens)
                return pages * self.ratio + max(0, offset - (self.page_tokens - self.ratio))
            case Kind.WINDOW_ROW | Kind.STREAM | Kind.ACCUMULATOR:
                return seq_len

    def reads(self, seq_len: int) -> range:
        """Indices that the tokens after the first ``seq_len`` read, or that later state is completed from.

        A query attends to the ``window - 1`` rows before its own, and to every closed block's entry [ATTN-27]. The
        block that is open is pooled from its own stream rows and the b-stream of the block before it [CSA-9..12]; where that
        one ended a page, its b-stream comes from the page's boundary rows and nothing from the ring. An open HCA block goes on
        from the accumulator of its last token [HCA-20..23].
        """
        block = seq_len - seq_len % self.ratio if self.ratio else 0  # first position of the open block
        is_first_of_page = block % self.page_tokens == 0
        match self.kind:
            case Kind.WINDOW_ROW:
                return range(max(0, seq_len - self.window + 1), seq_len)
            case Kind.ENTRY | Kind.INDEX_KEY:
                return range(self.written(seq_len))
            case Kind.BOUNDARY if is_first_of_page:
                return range(max(0, self.written(block) - self.ratio), self.written(block))
            case Kind.BOUNDARY:  # those of the open block, if it is the last of its page
                return range(self.written(block), self.written(seq_len))
            case Kind.STREAM:
                return range(block if is_first_of_page else block - self.ratio, seq_len)
            case Kind.ACCUMULATOR:
                return range(seq_len - (seq_len > block), seq_len)

    def needed(self, seq_len: int, min_len: int) -> Ranges:
        """Indices that a sequence of ``seq_len`` tokens needs, which may be cut back to any length from ``min_len`` on."""
        return _union(self.reads(length) for length in range(min_len, seq_len + 1))

    def needed_in(self, page: int, seq_len: int, min_len: int) -> list[int]:
        """Which rows of the sequence's page number ``page`` it needs, counted within the page; of a state slot, of the slot."""
        ranges = self.needed(seq_len, min_len)
        if self.owner is not Owner.STATE_SLOT:
            first, last = page * self.rows_per_owner, (page + 1) * self.rows_per_owner
            ranges = tuple(range(max(r.start, first), min(r.stop, last)) for r in ranges)
        return [index % self.rows_per_owner for r in ranges for index in r]

    def rows_of(self, batch: "SequenceBatch", indices: Sequence[Ranges]) -> "RowSet":
        """The rows of each sequence's indices."""
        owners, index = _flat(indices, batch.window.device)
        if self.owner is Owner.STATE_SLOT:
            held = torch.tensor(batch.state_slots, dtype=torch.int64, device=owners.device)[owners]
        else:
            table = batch.history if self.owner is Owner.HISTORY_PAGE else batch.window
            held = table[owners, index // self.rows_per_owner]
        return RowSet(held * self.rows_per_owner + index % self.rows_per_owner, owners, index)


@dataclass(frozen=True)
class SequenceBatch:
    """``N`` sequences at one moment.

    Attributes:
        seq_lens (list[int]): tokens of each.
        min_lens (list[int]): the shortest length to which each may be cut back.
        state_slots (list[int]): each one's row in the stream state.
        history (torch.Tensor): ``[N, P]`` int64 page tables, as in `dsv4_kernels.step.StepTensors`.
        window (torch.Tensor): ``[N, P]`` int64.
    """

    seq_lens: list[int]
    min_lens: list[int]
    state_slots: list[int]
    history: torch.Tensor
    window: torch.Tensor

    def needed(self, region: Region) -> "RowSet":
        """The rows of a region that the sequences need."""
        lengths = zip(self.seq_lens, self.min_lens, strict=True)
        return region.rows_of(self, [region.needed(seq_len, min_len) for seq_len, min_len in lengths])

    def written(self, region: Region, begins: Sequence[int]) -> "RowSet":
        """The rows that the last step wrote and that are still there, given the lengths before it.

        Rows of a page stay, and another sequence with these tokens may read them; of a ring only what the sequence needs.
        """
        ranges = []
        for begin, seq_len, min_len in zip(begins, self.seq_lens, self.min_lens, strict=True):
            new = range(region.written(begin), region.written(seq_len))
            there = region.needed(seq_len, min_len) if region.owner is Owner.STATE_SLOT else (new,)
            ranges.append(_union(range(max(r.start, new.start), r.stop) for r in there))
        return region.rows_of(self, ranges)


@dataclass(frozen=True)
class RowSet:
    """Rows of one region.

    Attributes:
        rows (torch.Tensor): ``[R]`` int64, row numbers within the region.
        owners (torch.Tensor): ``[R]`` int64, the sequence of each.
        indices (torch.Tensor): ``[R]`` int64, the index of each within its sequence.
    """

    rows: torch.Tensor
    owners: torch.Tensor
    indices: torch.Tensor


class RegionTable:
    """All regions of a cache.

    Attributes:
        layers (tuple[tuple[Region, ...], ...]): by layer.
        page_tokens (int): tokens per page.
        places (dict[Owner, tuple[Region, ...]]): one region of each `Region.places`; its row numbers are those of the others.
        most_window_pages (int): window pages that a sequence holds at most while no step of it crosses a page boundary.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.layers = tuple(layer_regions(spec, layer) for layer in spec.layers)
        self.page_tokens = spec.page_tokens
        self.places = {owner: tuple({region.places: region for region in self.owned_by(owner)}.values()) for owner in Owner}
        # At a page boundary the next page is taken before the oldest one can be given up.
        far = spec.page_tokens * (spec.window + spec.max_draft_tokens + 1)
        self.most_window_pages = 1 + len(self.window_pages(far, far - spec.max_draft_tokens))

    def __iter__(self) -> Iterator[Region]:
        return (region for regions in self.layers for region in regions)

    def owned_by(self, owner: Owner) -> tuple[Region, ...]:
        """Every region that a page of this kind, or a state slot, holds rows of."""
        return tuple(region for region in self if region.owner is owner)

    def bytes_of(self, owner: Owner) -> int:
        """Bytes of one page of this kind, or of one request's stream state, over all layers."""
        return sum(region.rows_per_owner * region.row_bytes for region in self.owned_by(owner))

    def num_pages(self, seq_len: int) -> int:
        """History pages of a sequence: ``ceil(seq_len / page_tokens)``."""
        return -(-seq_len // self.page_tokens)

    def window_pages(self, seq_len: int, min_len: int) -> range:
        """The sequence's page numbers whose window pages it needs: of the oldest row it may still read, and all later ones."""
        last, regions = self.num_pages(seq_len), self.places[Owner.WINDOW_PAGE]
        oldest = (ranges[0].start // region.rows_per_owner for region in regions if (ranges := region.needed(seq_len, min_len)))
        return range(min(oldest, default=last), last)

    def page_cut(self, seq_len: int) -> tuple[range, range]:
        """What a sequence that starts at a page boundary needs of the one whose tokens it shares: history and window pages.

        It needs no stream state. A prefix cache, a host tier and a transfer between servers keep exactly these pages.

        Raises:
            ValueError: not a page boundary.
        """
        if seq_len % self.page_tokens:
            raise ValueError(f"seq_len: expected a multiple of {self.page_tokens}, a page boundary, got {seq_len}")
        return range(self.num_pages(seq_len)), self.window_pages(seq_len, seq_len)


def layer_regions(spec: CacheSpec, layer: LayerSpec) -> tuple[Region, ...]:
    """What one layer holds."""

    def region(kind: Kind, part: Part, owner: Owner, rows: int, row_format: RowFormat | None, *shape: int) -> Region:
        return Region(layer.layer_id, kind, part, owner, rows, layer.ratio, spec.page_tokens, spec.window, row_format, shape)

    found = [region(Kind.WINDOW_ROW, Part.WINDOW, Owner.WINDOW_PAGE, spec.page_tokens, spec.rows, spec.head_dim)]
    if not layer.ratio:
        return tuple(found)
    per_page = spec.page_tokens // layer.ratio
    found.append(region(Kind.ENTRY, Part.MAIN, Owner.HISTORY_PAGE, per_page, spec.rows, spec.head_dim))
    if layer.indexed:
        found.append(region(Kind.INDEX_KEY, Part.INDEX, Owner.HISTORY_PAGE, per_page, spec.index_keys, spec.index_dim))
    if not layer.overlap:
        # After the last token, and after each that it may be rolled back to.
        ring = 1 + spec.max_draft_tokens
        return (*found, region(Kind.ACCUMULATOR, Part.MAIN, Owner.STATE_SLOT, ring, None, 3, spec.head_dim))
    # The previous and the open block, and what may be rolled back: one row more than is ever needed at once.
    ring = 2 * layer.ratio + spec.max_draft_tokens
    for part, dim in ((Part.MAIN, spec.head_dim), (Part.INDEX, spec.index_dim))[: 1 + layer.indexed]:
        found.append(region(Kind.STREAM, part, Owner.STATE_SLOT, ring, None, CSA_PARTS * dim))
        found.append(region(Kind.BOUNDARY, part, Owner.WINDOW_PAGE, layer.ratio, None, 2, dim))
    return tuple(found)


def history_bytes_per_token(spec: CacheSpec) -> float:
    """Bytes of entries and index keys per token of context, without the padding of groups."""
    return RegionTable(spec).bytes_of(Owner.HISTORY_PAGE) / spec.page_tokens


def _union(ranges: Iterable[range]) -> Ranges:
    """The same numbers as disjoint ranges in order, none of them empty."""
    merged: list[range] = []
    for r in sorted((r for r in ranges if r), key=lambda r: r.start):
        if merged and r.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, r.stop))
        else:
            merged.append(r)
    return tuple(merged)


def _flat(indices: Sequence[Ranges], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence and the index of every row, sequence after sequence: ``[R]`` int64 each."""
    spans = [(owner, r.start, len(r)) for owner, ranges in enumerate(indices) for r in ranges]
    owner, start, count = torch.tensor(spans, dtype=torch.int64).view(-1, 3).unbind(1)
    span = torch.repeat_interleave(torch.arange(len(spans)), count)
    offset = torch.arange(len(span)) - (count.cumsum(0) - count)[span]
    return owner[span].to(device), (start[span] + offset).to(device)
