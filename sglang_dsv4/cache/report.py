"""Where the bytes are."""

from dataclasses import dataclass

from sglang_dsv4.cache.request import Request
from sglang_dsv4.spec import CacheSpec


@dataclass(frozen=True)
class RequestReport:
    """One request's share.

    Attributes:
        req_id (int): the request.
        seq_len (int): committed tokens.
        tail_lens (dict[int, int]): tokens of the open block, by ratio.
        history_pages (int): pages of entries it owns.
        window_pages (int): window pages it owns.
        page_bytes (int): bytes of those pages, rows of closed blocks and room for open ones alike.
        stream_bytes (int): bytes of its stream state.
    """

    req_id: int
    seq_len: int
    tail_lens: dict[int, int]
    history_pages: int
    window_pages: int
    page_bytes: int
    stream_bytes: int


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds, in bytes really allocated.

    Attributes:
        row_format (str): format of window rows and entries.
        index_format (str): format of index keys.
        page_tokens (int): tokens per page.
        max_tokens (int): tokens that fit in the history pages.
        bytes_by_pool (dict[str, int]): sizes of the tensors; ``row_pools`` holds window rows and entries together.
        bytes_in_row_pools (dict[str, int]): how ``row_pools`` divides: ``window_rows``, ``entries``, ``padding``.
        total_bytes (int): sum of ``bytes_by_pool``.
        history_bytes_per_token (float): entries and index keys of one token of context.
        window_page_bytes (int): one window page, boundary state included.
        history_page_bytes (int): one history page.
        stream_bytes_per_request (int): stream state of one request.
        counts (dict[str, int]): pages and slots, total and free where the owner knows them.
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
    requests: tuple[RequestReport, ...]


def history_page_bytes(spec: CacheSpec) -> int:
    """Bytes of one history page over all layers: entries and index keys."""
    total = 0
    for layer in spec.layers:
        entries = spec.page_tokens // layer.ratio if layer.ratio else 0
        total += entries * spec.rows.row_bytes
        total += entries * spec.index_keys.row_bytes if layer.indexed else 0
    return total


def window_page_bytes(spec: CacheSpec) -> int:
    """Bytes of one window page over all layers: window rows and boundary state."""
    rows = len(spec.layers) * spec.page_tokens * spec.rows.row_bytes
    return rows + sum(spec.boundary_bytes(layer) for layer in spec.layers)


def stream_bytes_per_request(spec: CacheSpec) -> int:
    """Bytes of one request's stream state over all layers."""
    return sum(spec.stream_bytes(layer) for layer in spec.layers)


def report_request(spec: CacheSpec, request: Request) -> RequestReport:
    """One request's share of the cache."""
    window_pages = sum(page >= 0 for page in request.pages.window)
    history_pages = len(request.pages.history)
    ratios = sorted({layer.ratio for layer in spec.layers if layer.ratio})
    return RequestReport(
        req_id=request.req_id,
        seq_len=request.seq_len,
        tail_lens={ratio: request.tail_len(ratio) for ratio in ratios},
        history_pages=history_pages,
        window_pages=window_pages,
        page_bytes=history_pages * history_page_bytes(spec)
        + window_pages * window_page_bytes(spec),
        stream_bytes=stream_bytes_per_request(spec),
    )
