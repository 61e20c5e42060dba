"""A picture as lines of text."""

import unicodedata

from rich.text import Text as RichText

from sglang_dsv4.runtime.show.layout import BlockLane, PageBox, SequenceLayout

_NAME = 9
_REMARK = 38
_MIN_COLUMNS, _MAX_COLUMNS = 40, 84
_WIDTH = 132  # of text that no terminal asked for
_MAX_PER_TOKEN = 4
_STYLES = {"tokens": "bold", "window": "cyan", "csa": "green", "hca": "magenta", "page": "yellow"}

Line = tuple[str, str, str]  # name, drawing, remark


def plain_lines(picture: SequenceLayout) -> str:
    """The picture without colours."""
    return "\n".join(_joined(line, _WIDTH) for line in _lines(picture, _WIDTH))


def rich_lines(picture: SequenceLayout, width: int) -> RichText:
    """The picture with colours, for a terminal of so many columns."""
    text = RichText(no_wrap=True)
    for number, line in enumerate(_lines(picture, width)):
        style = next((s for name, s in _STYLES.items() if line[0].lower().startswith(name)), "")
        text.append(("\n" if number else "") + _joined(line, width), style=style)
    return text


def _joined(line: Line, width: int) -> str:
    """One line; the remark goes under the drawing where both are too wide."""
    name, drawing, remark = line
    joined = f"{name:<{_NAME}}{drawing}  {remark}".rstrip()
    if len(joined) <= width:
        return joined
    return f"{name:<{_NAME}}{drawing}\n{'':<{_NAME}}{remark}"


class _Scale:
    """Columns of tokens: several for each token of a short sequence, one for several tokens of a long one."""

    def __init__(self, seq_len: int, columns: int) -> None:
        self.seq_len = seq_len
        self.per_token = max(1, min(_MAX_PER_TOKEN, columns // max(1, seq_len)))
        self.per_column = -(-seq_len * self.per_token // columns) or 1
        self.width = self.column(seq_len)

    def column(self, token: int) -> int:
        """The column where a token begins."""
        if self.per_column == 1:
            return token * self.per_token
        return -(-token // self.per_column)

    def box(self, begin: int, end: int, label: str, fill: str = " ") -> str:
        """A box over tokens ``begin .. end-1`` without its right border, which the next box draws."""
        width = self.column(end) - self.column(begin)
        inner = max(0, width - 1)
        middle = label if len(label) <= inner else ""
        return ("│" + middle.center(inner, fill))[:width]


def _lines(picture: SequenceLayout, width: int) -> list[Line]:
    columns = min(_MAX_COLUMNS, max(_MIN_COLUMNS, width - _NAME - _REMARK))
    scale = _Scale(picture.seq_len, columns)
    pending = f", {picture.num_pending} more to be fed" if picture.num_pending else ""
    head = f"{picture.seq_len} tokens{pending}; pages of {picture.page_tokens}"
    lines: list[Line] = [(head, "", "")]
    lines.append(("", _ruler(scale), "position"))
    lines.append(("tokens", _tokens(picture, scale), ""))
    for lane in picture.lanes:
        lines += _block_lines(picture, scale, lane)
    remark = f"raw rows of the last {picture.window - 1} tokens"
    lines.append(("window", _window(picture, scale), remark))
    lines.append(("pages", _pages(picture, scale), "h history, w window, × owners"))
    return lines


def _ruler(scale: _Scale) -> str:
    drawing, column = "", 0
    for token in range(scale.seq_len):
        column = scale.column(token)
        label = str(token)
        is_round = token % (4 if scale.per_token > 1 else 64 * max(1, scale.per_column // 8)) == 0
        fits = len(drawing) <= column and column + len(label) <= scale.width
        if is_round and fits:
            drawing = drawing.ljust(column) + label + " "
    return drawing[: scale.width].ljust(scale.width)


def _tokens(picture: SequenceLayout, scale: _Scale) -> str:
    if scale.per_column > 1:
        shown = _printable("".join(picture.pieces))
        cut = f"{shown[: scale.width // 2 - 2]} … {shown[-(scale.width // 2 - 2) :]}"
        return cut[: scale.width].ljust(scale.width)
    return "".join(_printable(p)[: scale.per_token].ljust(scale.per_token) for p in picture.pieces)


def _printable(text: str) -> str:
    """One column per character, whatever the text."""
    shown = (
        c if c.isprintable() and unicodedata.east_asian_width(c) not in "WF" and not unicodedata.combining(c) else "·"
        for c in text.replace(" ", "·").replace("\ufffd", "·")
    )
    return "".join(shown)


def _block_lines(picture: SequenceLayout, scale: _Scale, lane: BlockLane) -> list[Line]:
    drawing = ""
    if scale.per_column * 2 <= lane.ratio or scale.per_column == 1:
        for entry in range(lane.num_entries):
            drawing += scale.box(entry * lane.ratio, (entry + 1) * lane.ratio, f"{entry}")
    else:
        drawing = "▪" * scale.column(lane.num_entries * lane.ratio)
    if lane.tail_len:
        begin = picture.seq_len - lane.tail_len
        drawing += scale.box(begin, picture.seq_len, f"{lane.tail_len}/{lane.ratio}", "░")
    plural = "entry" if lane.num_entries == 1 else "entries"
    tail = f"tail {lane.tail_len}/{lane.ratio}"
    remark = f"{lane.num_entries} {plural}, {tail}, in {lane.num_layers} layers"
    streams = " " * scale.column(lane.stream_begin)
    streams += "▔" * (scale.width - len(streams))
    return [
        (f"{lane.kind.upper()} {lane.ratio}", drawing.ljust(scale.width), remark),
        ("", streams, f"streams: {lane.stream_rows}"),
    ]


def _window(picture: SequenceLayout, scale: _Scale) -> str:
    left = scale.column(picture.window_begin)
    width = scale.width - left
    label = f" {picture.window_begin}..{picture.seq_len - 1} "
    if width < len(label) + 2:
        return " " * left + "═" * width
    return " " * left + "├" + label.center(width - 2, "─") + "┤"


def _pages(picture: SequenceLayout, scale: _Scale) -> str:
    return "".join(scale.box(box.begin, box.end, _page_label(box)) for box in picture.pages)


def _page_label(box: PageBox) -> str:
    def owners(count: int) -> str:
        return f"×{count}" if count > 1 else ""

    window = "w–" if box.window is None else f"w{box.window}{owners(box.window_owners)}"
    return f"h{box.history}{owners(box.history_owners)} {window}"
