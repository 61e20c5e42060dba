"""The picture of one sequence: its tokens, and where the cache has them."""

from dataclasses import dataclass
from typing import Any

from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.cache.pages.tables import NULL_PAGE
from sglang_dsv4.cache.regions import Owner
from sglang_dsv4.runtime.sequence import LiveSequence
from sglang_dsv4.runtime.text import Text


@dataclass(frozen=True)
class BlockLane:
    """The blocks of one ratio.

    Attributes:
        kind (str): ``"csa"`` or ``"hca"``.
        ratio (int): tokens per block.
        num_layers (int): layers that have this ratio.
        num_entries (int): closed blocks, each pooled into one entry.
        tail_len (int): tokens of the open block.
        stream_begin (int): first token that the stream state still knows.
        stream_rows (str): what the stream state holds, in words.
    """

    kind: str
    ratio: int
    num_layers: int
    num_entries: int
    tail_len: int
    stream_begin: int
    stream_rows: str


@dataclass(frozen=True)
class PageBox:
    """One page.

    Attributes:
        begin (int): its first token.
        end (int): one past its last token so far.
        history (int): history page.
        history_owners (int): sequences, snapshots and index entries that hold it.
        window (int | None): window page; None where it was released.
        window_owners (int): likewise.
    """

    begin: int
    end: int
    history: int
    history_owners: int
    window: int | None
    window_owners: int


@dataclass(frozen=True)
class Picture:
    """What there is to draw. A notebook shows it as a figure, ``print`` and rich as text.

    Attributes:
        seq_len (int): tokens in the cache.
        num_pending (int): tokens that follow and are fed with the next step.
        pieces (tuple[str, ...]): the text of each token.
        window (int): raw rows that a query attends to.
        page_tokens (int): tokens per page.
        lanes (tuple[BlockLane, ...]): blocks, by ratio.
        pages (tuple[PageBox, ...]): pages.
    """

    seq_len: int
    num_pending: int
    pieces: tuple[str, ...]
    window: int
    page_tokens: int
    lanes: tuple[BlockLane, ...]
    pages: tuple[PageBox, ...]

    @property
    def window_begin(self) -> int:
        """First token whose raw row the next token attends to; its own row is one of the window's."""
        return max(0, self.seq_len + 1 - self.window)

    def figure(self) -> Any:
        """A matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from sglang_dsv4.runtime.show.figure import draw_figure

        return draw_figure(self)

    def save(self, path: str) -> None:
        """Write the figure; the suffix says how: ``.svg``, ``.png``, ``.pdf``."""
        self.figure().savefig(path, bbox_inches="tight")

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from sglang_dsv4.runtime.show.text import rich_lines

        yield rich_lines(self, options.max_width)

    def __str__(self) -> str:
        from sglang_dsv4.runtime.show.text import plain_lines

        return plain_lines(self)

    __repr__ = __str__

    def _repr_svg_(self) -> str:
        from sglang_dsv4.runtime.show.figure import draw_svg

        return draw_svg(self)


def draw_sequence(cache: CompressedKVCache, sequence: LiveSequence, text: Text) -> Picture:
    """Collect the picture of a sequence.

    Args:
        cache (CompressedKVCache): owns its pages.
        sequence (LiveSequence): open.
        text (Text): for the tokens' text.
    """
    request, spec = sequence.request, cache.spec
    assert request is not None, "an open sequence has a request"
    kinds = sorted({(layer.ratio, layer.kind) for layer in spec.layers if layer.ratio})
    lanes = []
    for ratio, kind in kinds:
        length, tail = request.seq_len, request.tail_len(ratio)
        rows = next(r.rows_per_owner for r in cache.storage.table.owned_by(Owner.STATE_SLOT) if r.ratio == ratio)
        held = f"rows of the last {rows} tokens" if kind == "csa" else f"sums after the last {rows}"
        lanes.append(
            BlockLane(
                kind=kind,
                ratio=ratio,
                num_layers=sum(layer.ratio == ratio for layer in spec.layers),
                num_entries=request.num_entries(ratio),
                tail_len=tail,
                stream_begin=max(0, length - rows),
                stream_rows=held,
            )
        )
    return Picture(
        seq_len=request.seq_len,
        num_pending=sequence.num_pending,
        pieces=tuple(text.pieces(sequence.tokens[: request.seq_len])),
        window=spec.window,
        page_tokens=spec.page_tokens,
        lanes=tuple(lanes),
        pages=tuple(_page_boxes(cache, sequence)),
    )


def _page_boxes(cache: CompressedKVCache, sequence: LiveSequence) -> list[PageBox]:
    request, page_tokens = sequence.request, cache.spec.page_tokens
    assert request is not None, "an open sequence has a request"
    allocator = cache.requests.allocator
    boxes = []
    for index, (history, window) in enumerate(zip(request.pages.history, request.pages.window, strict=True)):
        held = window != NULL_PAGE
        boxes.append(
            PageBox(
                begin=index * page_tokens,
                end=min(request.seq_len, (index + 1) * page_tokens),
                history=history,
                history_owners=allocator.history.owners[history],
                window=window if held else None,
                window_owners=allocator.window.owners[window] if held else 0,
            )
        )
    return boxes
