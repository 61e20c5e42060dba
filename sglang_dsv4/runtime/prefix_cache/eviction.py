"""Room for sequences that must not run out of it half way."""

from collections.abc import Sequence

from sglang_dsv4.cache import CompressedKVCache, Request
from sglang_dsv4.errors import OutOfPagesError
from sglang_dsv4.runtime.prefix_cache.index import PrefixIndex


def make_room(cache: CompressedKVCache, index: PrefixIndex, growth: Sequence[tuple[Request, int]]) -> None:
    """Free as many pages as requests will take while they grow, by dropping what the index holds.

    Args:
        cache (CompressedKVCache): owns its pages.
        index (PrefixIndex): gives pages back.
        growth (Sequence[tuple[Request, int]]): requests, and by how many tokens each grows.

    Raises:
        OutOfPagesError: there is not that much room; no request was changed.
    """
    history = cache.ledger.allocator.history
    while True:
        needed = sum(_new_pages(cache, request, count) for request, count in growth)
        if needed <= len(history.free):
            return
        if not index.evict():
            tokens = sum(count for _, count in growth)
            raise OutOfPagesError(
                f"{tokens} more tokens need {needed} history pages: expected that many free, got {len(history.free)} "
                f"of {history.size}; nothing was changed"
            )


def _new_pages(cache: CompressedKVCache, request: Request, count: int) -> int:
    page_tokens, held = cache.spec.page_tokens, request.pages.history
    new = -(-(request.seq_len + count) // page_tokens) - len(held)
    owners = cache.ledger.allocator.history.owners
    copies = count > 0 and request.seq_len % page_tokens != 0 and owners[held[-1]] > 1
    return new + copies
