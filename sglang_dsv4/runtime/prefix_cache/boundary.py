"""A sequence up to a page boundary, held by its pages alone.

There nothing is pooled half: what the next block needs of the last one is the boundary state, and that lies in the window
page. So no stream state has to be copied, neither to keep it nor to go on from it.
"""

from sglang_dsv4.cache import CompressedKVCache, Request, Snapshot
from sglang_dsv4.cache.pages.allocator import NULL_PAGE, PageList


def keep_boundary(cache: CompressedKVCache, request: Request) -> Snapshot:
    """Share the pages of a request that ends at a page boundary.

    Args:
        cache (CompressedKVCache): owns its pages.
        request (Request): its length is a positive multiple of ``page_tokens``.

    Returns:
        Snapshot: to be continued with `continue_boundary`, and released with `CompressedKVCache.release`.
    """
    pages = request.pages
    assert request.seq_len == len(pages.history) * cache.spec.page_tokens > 0, "at a page boundary"
    # A window reaches back less than a page.
    window = [NULL_PAGE] * (len(pages.window) - 1) + pages.window[-1:]
    kept = PageList(list(pages.history), window)
    return cache.ledger.keep(request, kept, min_len=request.seq_len, state=())


def continue_boundary(cache: CompressedKVCache, kept: Snapshot) -> Request:
    """Start a sequence that continues from there; ``kept`` stays.

    Raises:
        OutOfPagesError: every state slot is taken; nothing was changed.
    """
    cache.ledger.check_kept(kept)
    return cache.ledger.open(kept.seq_len, kept.min_len, kept.pages)
