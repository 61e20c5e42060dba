"""The picture of one sequence: its tokens, and where the cache has them."""

from dataclasses import dataclass
from typing import Any

from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.cache.pages.tables import NULL_PAGE
from sglang_dsv4.cache.regions import Kind, Owner, layer_regions
from sglang_dsv4.runtime.sequence import LiveSequence
from sglang_dsv4.runtime.show.figure import draw_figure, draw_svg
from sglang_dsv4.runtime.show.layout import BlockLane, PageBox, SequenceLayout
from sglang_dsv4.runtime.show.text import plain_lines, rich_lines
from sglang_dsv4.runtime.text import Text


@dataclass(frozen=True, repr=False)
class Picture(SequenceLayout):
    """One sequence, drawn: a notebook shows it as a figure, ``print`` and rich as text."""

    def figure(self) -> Any:
        """A matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return draw_figure(self)

    def save(self, path: str) -> None:
        """Write the figure; the suffix says how: ``.svg``, ``.png``, ``.pdf``."""
        self.figure().savefig(path, bbox_inches="tight")

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield rich_lines(self, options.max_width)

    def __str__(self) -> str:
        return plain_lines(self)

    __repr__ = __str__

    def _repr_svg_(self) -> str:
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
        layer = next(layer for layer in spec.layers if layer.ratio == ratio)
        rows = next(region.rows_per_owner for region in layer_regions(spec, layer) if region.owner is Owner.STATE_SLOT)
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
    window = next(region for region in cache.storage.table if region.kind is Kind.WINDOW_ROW)
    return Picture(
        seq_len=request.seq_len,
        num_pending=sequence.num_pending,
        pieces=tuple(text.pieces(sequence.tokens[: request.seq_len])),
        window=spec.window,
        window_begin=window.reads(request.seq_len).start,
        page_tokens=spec.page_tokens,
        lanes=tuple(lanes),
        pages=tuple(_page_boxes(cache, sequence)),
    )


def _page_boxes(cache: CompressedKVCache, sequence: LiveSequence) -> list[PageBox]:
    request, page_tokens = sequence.request, cache.spec.page_tokens
    assert request is not None, "an open sequence has a request"
    num_owners = cache.requests.num_owners
    boxes = []
    for index, (history, window) in enumerate(zip(request.pages.history, request.pages.window, strict=True)):
        held = window != NULL_PAGE
        boxes.append(
            PageBox(
                begin=index * page_tokens,
                end=min(request.seq_len, (index + 1) * page_tokens),
                history=history,
                history_owners=num_owners(Owner.HISTORY_PAGE, history),
                window=window if held else None,
                window_owners=num_owners(Owner.WINDOW_PAGE, window) if held else 0,
            )
        )
    return boxes
