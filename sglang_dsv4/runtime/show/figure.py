"""A picture as a matplotlib figure. Matplotlib is imported by the first one: it takes a second, and text needs none of it."""

import io
import unicodedata
from typing import Any

from sglang_dsv4.runtime.show.layout import BlockLane, SequenceLayout

_WIDTH_INCHES = 11.0
_LANE_INCHES = 0.55
_CLOSED = {"csa": ("#9ccf8f", "#c5e5bc"), "hca": ("#c9a3dd", "#e3cdee")}
_OPEN, _STREAM = "#f7f3e8", "#4a6fa5"
_WINDOW, _PAGE, _SHARED = "#8fd3e8", "#f2d58a", "#f0a860"
_TEXT_TOKENS = 48  # the characters of a longer sequence would be too small to read


def draw_figure(picture: SequenceLayout) -> Any:
    """Draw, top to bottom: tokens, blocks and entries of each ratio with the reach of its streams, window, pages."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = ["tokens"]
    for lane in picture.lanes:
        names.append(f"{lane.kind.upper()}: {lane.ratio} tokens\nper entry, {lane.num_layers} layers")
    names += [f"window\n(last {picture.window})", f"pages\n(of {picture.page_tokens})"]
    figure = Figure(figsize=(_WIDTH_INCHES, _LANE_INCHES * (len(names) + 1.6)))
    axes = figure.subplots()
    top = len(names)
    _draw_tokens(axes, picture, top - 1)
    for number, lane in enumerate(picture.lanes):
        _draw_blocks(axes, picture, lane, top - 2 - number)
    _draw_window(axes, picture, 1)
    _draw_pages(axes, picture, 0)
    axes.set_xlim(0, max(1, picture.seq_len))
    axes.set_ylim(-0.1, top)
    axes.set_yticks([top - 0.5 - i for i in range(top)], names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("position")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(_title(picture), fontsize=10, loc="left")
    return figure


def draw_svg(picture: SequenceLayout) -> str:
    """The figure as SVG text."""
    buffer = io.StringIO()
    draw_figure(picture).savefig(buffer, format="svg", bbox_inches="tight")
    return buffer.getvalue()


def _title(picture: SequenceLayout) -> str:
    parts = [f"{picture.seq_len} tokens"]
    if picture.num_pending:
        parts.append(f"{picture.num_pending} more to be fed")
    for lane in picture.lanes:
        parts.append(f"{lane.kind.upper()} {lane.num_entries} entries + {lane.tail_len} open")
    return " · ".join(parts)


def _box(axes: Any, begin: float, width: float, row: float, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((begin, row + 0.15), width, 0.7, **style))


def _label(axes: Any, begin: float, end: float, row: float, text: str, share: float, **style: Any) -> None:
    """Write in the middle of a box, where the text fits: about 130 characters go over the whole width."""
    if text and (end - begin) / share * 130 >= len(text):
        middle = (begin + end) / 2
        axes.text(middle, row + 0.5, text, ha="center", va="center", fontsize=8, **style)


def _note(axes: Any, picture: SequenceLayout, height: float, text: str, color: str) -> None:
    """Write beside a lane."""
    axes.annotate(
        text,
        (picture.seq_len, height),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color=color,
        annotation_clip=False,
    )


def _draw_tokens(axes: Any, picture: SequenceLayout, row: int) -> None:
    if picture.seq_len > _TEXT_TOKENS:
        _box(axes, 0, picture.seq_len, row, facecolor="#eeeeee", edgecolor="none")
        text = _drawable("".join(picture.pieces))
        shown = text if len(text) <= 110 else f"{text[:52]} … {text[-52:]}"
        _label(axes, 0, picture.seq_len, row, shown, picture.seq_len)
        return
    for position, piece in enumerate(picture.pieces):
        _box(axes, position, 1, row, facecolor="#eeeeee", edgecolor="white")
        _label(axes, position, position + 1, row, _drawable(piece), picture.seq_len)


def _drawable(text: str) -> str:
    """The text with a dot for every character that the default font does not have."""
    known = _known_characters()
    text = text.replace(" ", "·").replace("$", r"\$")
    return "".join(c if ord(c) in known and c.isprintable() and not unicodedata.combining(c) else "·" for c in text)


def _known_characters() -> frozenset[int]:
    from matplotlib import font_manager

    path = font_manager.findfont(font_manager.FontProperties())
    return frozenset(font_manager.get_font(path).get_charmap())


def _draw_blocks(axes: Any, picture: SequenceLayout, lane: BlockLane, row: int) -> None:
    total = picture.seq_len
    for entry in range(lane.num_entries):
        begin = entry * lane.ratio
        color = _CLOSED[lane.kind][entry % 2]
        _box(axes, begin, lane.ratio, row, facecolor=color, edgecolor="none")
        _label(axes, begin, begin + lane.ratio, row, str(entry), total)
    if lane.tail_len:
        begin = total - lane.tail_len
        style = {"facecolor": _OPEN, "edgecolor": "#999999", "hatch": "///", "linewidth": 0.6}
        _box(axes, begin, lane.tail_len, row, **style)
        plain = {"facecolor": _OPEN, "edgecolor": "none", "pad": 1.5}  # hatching hides letters
        _label(axes, begin, total, row, f"{lane.tail_len}/{lane.ratio}", total, bbox=plain)
    if total:
        axes.plot([lane.stream_begin, total], [row + 0.05] * 2, color=_STREAM, linewidth=3, solid_capstyle="butt")
        _note(axes, picture, row + 0.05, f"streams: {lane.stream_rows}", _STREAM)


def _draw_window(axes: Any, picture: SequenceLayout, row: int) -> None:
    begin, end = picture.window_begin, picture.seq_len
    _box(axes, begin, end - begin, row, facecolor=_WINDOW, edgecolor="none")
    if end > begin:
        _label(axes, begin, end, row, f"{begin} .. {end - 1}", picture.seq_len)


def _draw_pages(axes: Any, picture: SequenceLayout, row: int) -> None:
    for box in picture.pages:
        color = _SHARED if box.history_owners > 1 else _PAGE
        _box(axes, box.begin, box.end - box.begin, row, facecolor=color, edgecolor="white")
        history = f"history {box.history}" + (f" ×{box.history_owners}" if box.history_owners > 1 else "")
        window = "released" if box.window is None else f"{box.window}"
        if box.window_owners > 1:
            window += f" ×{box.window_owners}"
        _label(axes, box.begin, box.end, row, f"{history}, window {window}", picture.seq_len)
    if any(box.history_owners > 1 or box.window_owners > 1 for box in picture.pages):
        _note(axes, picture, row + 0.5, "×n: shared by n owners", "#a0622a")
