"""Where the bytes are."""

from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from sglang_dsv4.cache.pages.allocator import PageAllocator
from sglang_dsv4.cache.pages.request import Request
from sglang_dsv4.cache.regions import Kind, Owner, RegionTable
from sglang_dsv4.cache.storage import CacheStorage, Capacity
from sglang_dsv4.spec import CacheSpec


@dataclass(frozen=True)
class RequestReport:
    """One request's share.

    Attributes:
        req_id (int): the request.
        seq_len (int): committed tokens.
        tail_lens (dict[int, int]): tokens of the open block, by ratio.
        tokens_to_flush (dict[int, int]): tokens until the open block closes, by ratio.
        history_pages (int): pages of entries it holds.
        window_pages (int): window pages it holds.
        shared_pages (int): how many of these another request or snapshot holds too.
        page_bytes (int): bytes of those pages, rows of closed blocks and room for open ones alike.
        own_bytes (int): bytes that closing it would free: pages that it alone holds, and its stream state.
        stream_bytes (int): bytes of its stream state.
    """

    req_id: int
    seq_len: int
    tail_lens: dict[int, int]
    tokens_to_flush: dict[int, int]
    history_pages: int
    window_pages: int
    shared_pages: int
    page_bytes: int
    own_bytes: int
    stream_bytes: int


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds, in bytes really allocated.

    Attributes:
        row_format (str): format of window rows and entries.
        index_format (str): format of index keys.
        page_tokens (int): tokens per page.
        max_tokens (int): tokens that fit in the history pages.
        bytes_by_pool (dict[str, int]): sizes of the tensors; ``row_pools`` holds window rows and entries together, and
            ``snapshots`` and ``undo`` are copies of stream state beside the pools, ``scratch`` is the kernels'.
        bytes_in_row_pools (dict[str, int]): how ``row_pools`` divides: ``window_rows``, ``entries``, ``padding``.
        total_bytes (int): sum of ``bytes_by_pool``.
        history_bytes_per_token (float): entries and index keys of one token of context.
        window_page_bytes (int): one window page, boundary state included.
        history_page_bytes (int): one history page.
        stream_bytes_per_request (int): stream state of one request.
        counts (dict[str, int]): pages and slots, total and free where the owner knows them.
        bytes_copied (dict[str, int]): since the cache was made: stream state by ``fork``, ``snapshot`` and ``restore``, rows
            by ``copy_on_write``, and by ``undo`` the stream state that steps could have to put back.
        requests (tuple[RequestReport, ...]): open requests.
    """

    row_format: str
    index_format: str
    page_tokens: int
    max_tokens: int
    bytes_by_pool: dict[str, int]
    bytes_in_row_pools: dict[str, int]
    total_bytes: int
    history_bytes_per_token: float
    window_page_bytes: int
    history_page_bytes: int
    stream_bytes_per_request: int
    counts: dict[str, int]
    bytes_copied: dict[str, int]
    requests: tuple[RequestReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for programs."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(f"{name:<32}{value:>20}" for name, value in self._lines())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td style='text-align:right'>{escape(value)}</td></tr>"
            for name, value in self._lines()
        )
        return f"<table>{rows}</table>"

    def _lines(self) -> list[tuple[str, str]]:
        lines = [
            ("rows / index keys", f"{self.row_format} / {self.index_format}"),
            ("tokens, at most", f"{self.max_tokens:,}"),
            ("bytes of a token's history", f"{self.history_bytes_per_token:,.1f}"),
        ]
        for name, size in self.bytes_by_pool.items():
            lines.append((f"bytes of {_words(name)}", f"{size:,}"))
            if name == "row_pools":
                lines += [(f"  {_words(part)}", f"{of_it:,}") for part, of_it in self.bytes_in_row_pools.items()]
        lines.append(("bytes in all", f"{self.total_bytes:,}"))
        lines += [(_words(name), f"{count:,}") for name, count in self.counts.items()]
        lines += [(f"bytes copied by {_words(name)}", f"{size:,}") for name, size in self.bytes_copied.items()]
        for request in self.requests:
            tail = ", ".join(f"{length} of {ratio}" for ratio, length in request.tail_lens.items())
            flush = ", ".join(str(count) for count in request.tokens_to_flush.values())
            held = request.history_pages + request.window_pages
            lines += [
                (f"request {request.req_id}", f"{request.seq_len:,} tokens"),
                ("  pending tail rows", tail),
                ("  tokens to the next flush", flush),
                ("  pages, of them shared", f"{held}, {request.shared_pages}"),
                ("  bytes of its pages", f"{request.page_bytes:,}"),
                ("  bytes that closing frees", f"{request.own_bytes:,}"),
                ("  bytes of its stream state", f"{request.stream_bytes:,}"),
            ]
        return lines


def _words(name: str) -> str:
    return name.replace("_", " ")


def report_request(spec: CacheSpec, table: RegionTable, allocator: PageAllocator, request: Request) -> RequestReport:
    """One request's share of the cache."""
    history, window = request.pages.history, [page for page in request.pages.window if page >= 0]
    shared_history = sum(allocator.history.owners[page] > 1 for page in history)
    shared_window = sum(allocator.window.owners[page] > 1 for page in window)
    per_history, per_window = table.bytes_of(Owner.HISTORY_PAGE), table.bytes_of(Owner.WINDOW_PAGE)
    stream_bytes = table.bytes_of(Owner.STATE_SLOT)
    page_bytes = len(history) * per_history + len(window) * per_window
    ratios = sorted({layer.ratio for layer in spec.layers if layer.ratio})
    return RequestReport(
        req_id=request.req_id,
        seq_len=request.seq_len,
        tail_lens={ratio: request.tail_len(ratio) for ratio in ratios},
        tokens_to_flush={ratio: ratio - request.tail_len(ratio) for ratio in ratios},
        history_pages=len(history),
        window_pages=len(window),
        shared_pages=shared_history + shared_window,
        page_bytes=page_bytes,
        own_bytes=page_bytes - shared_history * per_history - shared_window * per_window + stream_bytes,
        stream_bytes=stream_bytes,
    )


def build_report(
    spec: CacheSpec,
    storage: CacheStorage,
    capacity: Capacity,
    counts: dict[str, int],
    beside: dict[str, int],
    bytes_copied: dict[str, int] | None = None,
    requests: tuple[RequestReport, ...] = (),
) -> CacheReport:
    """Where the bytes of a cache are; ``beside`` are bytes that are held but lie in no pool, by name."""
    table, by_pool = storage.table, storage.bytes_by_pool() | beside
    in_row_pools = {Kind.WINDOW_ROW: 0, Kind.ENTRY: 0}
    for region in table:
        if region.kind in in_row_pools:
            in_row_pools[region.kind] += capacity.count(region.owner) * region.rows_per_owner * region.row_bytes
    history = table.bytes_of(Owner.HISTORY_PAGE)
    return CacheReport(
        row_format=spec.row_format,
        index_format=spec.index_format,
        page_tokens=spec.page_tokens,
        max_tokens=(capacity.history_pages - capacity.reserved_pages) * spec.page_tokens,
        bytes_by_pool=by_pool,
        bytes_in_row_pools={
            "window_rows": in_row_pools[Kind.WINDOW_ROW],
            "entries": in_row_pools[Kind.ENTRY],
            "padding": by_pool["row_pools"] - sum(in_row_pools.values()),
        },
        total_bytes=sum(by_pool.values()),
        history_bytes_per_token=history / spec.page_tokens,
        window_page_bytes=table.bytes_of(Owner.WINDOW_PAGE),
        history_page_bytes=history,
        stream_bytes_per_request=table.bytes_of(Owner.STATE_SLOT),
        counts=counts,
        bytes_copied=bytes_copied or {},
        requests=requests,
    )
