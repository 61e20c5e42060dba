"""Room for sequences that must not run out of it half way."""

from collections.abc import Sequence

from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.cache.pages.room import Growth, Room
from sglang_dsv4.errors import OutOfPagesError
from sglang_dsv4.runtime.prefix_cache.index import PrefixIndex


def check_room(cache: CompressedKVCache, index: PrefixIndex, growth: Sequence[Growth]) -> None:
    """Raise unless sequences could grow if the index held nothing; changes nothing.

    Args:
        cache (CompressedKVCache): owns its pages.
        index (PrefixIndex): would give its pages back.
        growth (Sequence[Growth]): sequences that grow together.

    Raises:
        OutOfPagesError: there is not that much room.
    """
    _refuse(cache.requests.room_for(growth, index.held), growth)


def make_room(cache: CompressedKVCache, index: PrefixIndex, growth: Sequence[Growth]) -> None:
    """Free as many pages as sequences will take while they grow, by dropping entries of the index.

    Args:
        cache (CompressedKVCache): owns its pages.
        index (PrefixIndex): gives pages back.
        growth (Sequence[Growth]): open requests that grow together.

    Raises:
        OutOfPagesError: there is not that much room; nothing was changed.
    """
    check_room(cache, index, growth)
    while _lacking(found := cache.requests.room_for(growth)):
        if not index.evict():
            _refuse(found, growth)


def _lacking(rooms: Sequence[Room]) -> Room | None:
    return next((room for room in rooms if room.needed > room.free), None)


def _refuse(rooms: Sequence[Room], growth: Sequence[Growth]) -> None:
    room = _lacking(rooms)
    if room is not None:
        tokens = sum(one.new_len - one.seq_len for one in growth)
        raise OutOfPagesError(
            f"{tokens} more tokens need {room.needed} {room.pool}: expected that many free, or held by prefixes alone, got "
            f"{room.free} of {room.size}; nothing was changed",
            room.pool,
            room.needed,
            room.free,
        )
