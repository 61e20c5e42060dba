"""How many pages sequences will take while they grow, counted before any is taken."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sglang_dsv4.cache.pages.allocator import PageAllocator
from sglang_dsv4.cache.pages.tables import NULL_PAGE, PageList
from sglang_dsv4.cache.regions import Owner, RegionTable

Held = Mapping[Owner, Mapping[int, int]]  # by kind of page: how many owners of each page


@dataclass(frozen=True)
class Growth:
    """A sequence that shall hold more tokens, fed in steps that stay within one of its pages.

    Attributes:
        pages (PageList): its pages, or those of the sequence that it would begin with.
        seq_len (int): tokens in these.
        new_len (int): tokens that it shall hold.
        is_open (bool): it holds its pages; otherwise it would become one more owner of them.
    """

    pages: PageList
    seq_len: int
    new_len: int
    is_open: bool = True


@dataclass(frozen=True)
class Room:
    """What growth takes from one pool.

    Attributes:
        pool (str): its name.
        needed (int): pages that have to be free.
        free (int): those that are.
        size (int): those that exist.
    """

    pool: str
    needed: int
    free: int
    size: int


def room_for(table: RegionTable, allocator: PageAllocator, growth: Sequence[Growth], without: Held) -> tuple[Room, Room]:
    """Room of the history pages and of the window pages for sequences that grow together.

    Args:
        table (RegionTable): which window pages a sequence needs.
        allocator (PageAllocator): who owns what.
        growth (Sequence[Growth]): the sequences.
        without (Held): owners to leave out, as if they had let go of their pages.
    """
    found = []
    for owner in (Owner.HISTORY_PAGE, Owner.WINDOW_PAGE):
        pool, left_out = allocator.pool(owner), without.get(owner, {})
        needed = 0
        for one in growth:
            held = one.pages.history if owner is Owner.HISTORY_PAGE else one.pages.window
            others = [pool.owners[p] - left_out.get(p, 0) - one.is_open if p != NULL_PAGE else -1 for p in held]
            taken, own = _pages_taken(one, others, table.page_tokens)
            if owner is Owner.WINDOW_PAGE:  # of which a sequence gives up the oldest as it goes on
                taken = min(taken, table.most_window_pages - own)
            needed += taken
        freed = sum(pool.owners[page] == count for page, count in left_out.items())
        found.append(Room(pool.name, needed, len(pool.free) + freed, pool.size))
    return found[0], found[1]


def _pages_taken(growth: Growth, others: Sequence[int], page_tokens: int) -> tuple[int, int]:
    """Pages of one pool that a sequence takes altogether, and those that it alone holds so far.

    Args:
        growth (Growth): the sequence.
        others (Sequence[int]): further owners of each of its pages; -1 for one that it has given up.
        page_tokens (int): tokens per page.
    """
    if growth.new_len == growth.seq_len:
        return 0, 0
    given_up = sum(count < 0 for count in others)
    kept = [count > 0 or (growth.is_open and count == 0) for count in others]
    if growth.seq_len % page_tokens and others[-1] > 0:
        kept[-1] = False  # shared and written: it gets a copy
    own = sum(count == 0 for count in others) if growth.is_open else 0
    return -(-growth.new_len // page_tokens) - given_up - sum(kept), own
