"""Room for sequences that must not run out of it half way."""

from collections.abc import Sequence

from sglang_dsv4.cache import CompressedKVCache, Request
from sglang_dsv4.errors import OutOfPagesError
from sglang_dsv4.runtime.prefix_cache.index import PrefixIndex


def make_room(cache: CompressedKVCache, index: PrefixIndex, growth: Sequence[tuple[Request, int]]) -> None:
    """Free as many history pages as requests will take while they grow, by dropping what the index holds.

    Args:
        cache (CompressedKVCache): owns its pages.
        index (PrefixIndex): gives pages back.
        growth (Sequence[tuple[Request, int]]): requests, and by how many tokens each grows.

    Raises:
        OutOfPagesError: there is not that much room; no request was changed.
    """
    while True:
        needed, free = cache.requests.history_pages_for(growth), cache.requests.allocator.counts()["history_pages_free"]
        if needed <= free:
            return
        if not index.evict():
            tokens = sum(count for _, count in growth)
            raise OutOfPagesError(
                f"{tokens} more tokens need {needed} history pages: expected that many free, got {free} of "
                f"{cache.requests.allocator.capacity.history_pages}; nothing was changed",
                "history pages",
                needed,
                free,
            )
