"""What a runtime reports of itself."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.cache.inspect.report import CacheReport
from sglang_dsv4.runtime.prefix_cache.index import PrefixIndex
from sglang_dsv4.runtime.sequence import LiveSequence
from sglang_dsv4.runtime.show.units import format_bytes
from sglang_dsv4.runtime.text import Text

_PREVIEW = 32
_WIDTH = 110


@dataclass(frozen=True)
class RuntimeReport:
    """A `CacheReport`, the prefix index, and the texts of open sequences.

    Shown as tables by a notebook, by ``print`` and by rich.

    Attributes:
        checkpoint (str): the model.
        cache (CacheReport): the cache.
        index (dict[str, int]): what the prefix index holds, and how often it helped.
        texts (dict[int, str]): the end of each open sequence's text, by ``req_id``.
    """

    checkpoint: str
    cache: CacheReport
    index: dict[str, int]
    texts: dict[int, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, by name."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        return Group(*(_rich_table(title, rows) for title, rows in self._tables()))

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, force_jupyter=False)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(_html_table(title, rows) for title, rows in self._tables())

    def _tables(self) -> list[tuple[str, list[list[str]]]]:
        tables = [(f"Cache of {self.checkpoint}", self._pools()), ("Prefix index", self._index())]
        return [*tables, ("Open sequences", self._sequences())] if self.cache.requests else tables

    def _pools(self) -> list[list[str]]:
        cache, counts = self.cache, self.cache.counts
        total = cache.total_bytes
        rows = [["pool", "bytes", "share", "in use"]]
        used = {
            kind: f"{counts[kind] - counts[f'{kind}_free']} of {counts[kind]} {kind.replace('_', ' ')}"
            for kind in ("history_pages", "window_pages", "state_slots")
        }
        parts = {
            "window rows": (cache.bytes_in_row_pools["window_rows"], used["window_pages"]),
            "entries": (cache.bytes_in_row_pools["entries"], used["history_pages"]),
            "index keys": (cache.bytes_by_pool["index_keys"], used["history_pages"]),
            "stream state": (cache.bytes_by_pool["stream_state"], used["state_slots"]),
            "boundary state": (cache.bytes_by_pool["boundary_state"], used["window_pages"]),
            "padding": (cache.bytes_in_row_pools["padding"], ""),
            "RoPE tables": (cache.bytes_by_pool["rope_tables"], ""),
            "snapshots": (cache.bytes_by_pool["snapshots"], "stream state"),
            "undo copies": (cache.bytes_by_pool["undo"], "stream state"),
        }
        for name, (size, use) in parts.items():
            rows.append([name, format_bytes(size), f"{100 * size / total:.1f} %", use])
        per_token = f"{format_bytes(cache.history_bytes_per_token)} per token of context"
        return [*rows, ["total", format_bytes(total), "100.0 %", per_token]]

    def _index(self) -> list[list[str]]:
        index = self.index
        hit = 100 * index["tokens_hit"] / max(1, index["tokens_asked"])
        return [
            ["kept", "held", "found"],
            [
                f"{index['boundaries']} page boundaries, {index['ends']} ends",
                f"{index['pages']} history pages, {format_bytes(index['state_bytes'])} beside the pools",
                f"{index['hits']} of {index['lookups']} prompts, {hit:.0f} % of their tokens; {index['evictions']} evicted",
            ],
        ]

    def _sequences(self) -> list[list[str]]:
        rows = [["id", "tokens", "open blocks", "to flush", "pages", "bytes", "its own", "text"]]
        for request in self.cache.requests:
            tails = ", ".join(f"{tail}/{ratio}" for ratio, tail in request.tail_lens.items())
            flush = ", ".join(str(count) for count in request.tokens_to_flush.values())
            pages = f"{request.history_pages + request.window_pages}"
            if request.shared_pages:
                pages += f", {request.shared_pages} shared"
            total = request.page_bytes + request.stream_bytes
            sizes = [format_bytes(total), format_bytes(request.own_bytes)]
            text = self.texts.get(request.req_id, "")
            rows.append([str(request.req_id), str(request.seq_len), tails, flush, pages, *sizes, text])
        return rows


def make_report(
    checkpoint: str, cache: CompressedKVCache, index: PrefixIndex, live: Sequence[LiveSequence], text: Text
) -> RuntimeReport:
    """Collect a report."""
    texts = {}
    for sequence in live:
        if sequence.request is not None:
            end = text.decode(sequence.tokens[-_PREVIEW:])
            shown = repr(end)[1:-1]
            texts[sequence.request.req_id] = ("…" if len(sequence.tokens) > _PREVIEW else "") + shown
    return RuntimeReport(
        checkpoint=checkpoint,
        cache=cache.report(),
        index={
            "boundaries": index.num_boundaries,
            "ends": index.num_ends,
            "pages": index.num_pages,
            "state_bytes": index.state_bytes,
            **index.counters.to_dict(),
        },
        texts=texts,
    )


def _rich_table(title: str, rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(rows[0]):
        is_number = name in ("bytes", "share", "tokens", "its own")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=number == 0)
    for row in rows[1:]:
        table.add_row(*(_escape_markup(cell) for cell in row))
    return table


def _escape_markup(cell: str) -> str:
    return cell.replace("[", "\\[")


def _html_table(title: str, rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_escape_html(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    head = f"<caption>{_escape_html(title)}</caption><thead>{line(rows[0], 'th')}</thead>"
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _escape_html(cell: str) -> str:
    return cell.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
