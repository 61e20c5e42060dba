"""Gives out pages and state slots, and lets sequences share pages until one of them writes."""

from collections.abc import Sequence
from itertools import islice

from sglang_dsv4.cache.pages.tables import NULL_PAGE, PageGrant, PageList
from sglang_dsv4.cache.regions import Owner, RegionTable
from sglang_dsv4.cache.storage import Capacity
from sglang_dsv4.errors import OutOfPagesError


class FreeList:
    """Numbers ``0 .. size-1``: which are free, in the fixed order in which they are handed out, and owners of the rest."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.free = list(range(size - 1, -1, -1))
        self.owners = [0] * size

    def peek(self, count: int) -> tuple[int, ...]:
        """The next ``count`` numbers that `take` may be given; changes nothing.

        Raises:
            OutOfPagesError: not that many are free.
        """
        if count > len(self.free):
            raise OutOfPagesError(
                f"{self.name}: expected {count} free, got {len(self.free)} of {self.size}; nothing was changed",
                self.name,
                count,
                len(self.free),
            )
        return tuple(reversed(self.free[len(self.free) - count :]))

    def take(self, numbers: Sequence[int]) -> None:
        """Hand out numbers that `peek` named; others may have come free since, and lie before them."""
        for number in numbers:
            assert self.owners[number] == 0, f"{self.name}: {number} was granted and is not free"
            if self.free[-1] == number:
                self.free.pop()
            else:
                self.free.remove(number)
            self.owners[number] = 1

    def share(self, number: int) -> None:
        """Add an owner."""
        self.owners[number] += 1

    def release(self, number: int) -> None:
        """Remove an owner; the number is free when the last one goes."""
        self.owners[number] -= 1
        if self.owners[number] == 0:
            self.free.append(number)


class PageAllocator:
    """The cache's own owner: free lists of history pages, window pages and state slots."""

    def __init__(self, capacity: Capacity, table: RegionTable) -> None:
        self.capacity = capacity
        self._table = table
        self.history = FreeList("history pages", capacity.history_pages)
        self.window = FreeList("window pages", capacity.window_pages)
        self.slots = FreeList("state slots", capacity.state_slots)

    def pool(self, owner: Owner) -> FreeList:
        """The free list of a kind of page, or of state slots."""
        return {Owner.HISTORY_PAGE: self.history, Owner.WINDOW_PAGE: self.window, Owner.STATE_SLOT: self.slots}[owner]

    def counts(self) -> dict[str, int]:
        return {
            "history_pages": self.history.size,
            "history_pages_free": len(self.history.free),
            "history_pages_shared": sum(owners > 1 for owners in self.history.owners),
            "window_pages": self.window.size,
            "window_pages_free": len(self.window.free),
            "window_pages_shared": sum(owners > 1 for owners in self.window.owners),
            "state_slots": self.slots.size,
            "state_slots_free": len(self.slots.free),
        }

    def grant(self, sequences: Sequence[tuple[PageList, int, int]]) -> list[PageGrant]:
        """Pages that sequences need in order to grow; changes nothing.

        Args:
            sequences (Sequence[tuple[PageList, int, int]]): each sequence's pages, its tokens, and the tokens it shall hold.

        Raises:
            OutOfPagesError: not enough free pages for all of them together.
        """
        needs = [self._needs(*sequence) for sequence in sequences]
        history = iter(self.history.peek(sum(new + copies_history for new, copies_history, _ in needs)))
        window = iter(self.window.peek(sum(new + copies_window for new, _, copies_window in needs)))
        return [
            PageGrant(
                history_copy=next(history) if copies_history else NULL_PAGE,
                window_copy=next(window) if copies_window else NULL_PAGE,
                history=tuple(islice(history, new)),
                window=tuple(islice(window, new)),
            )
            for new, copies_history, copies_window in needs
        ]

    def _needs(self, pages: PageList, seq_len: int, new_len: int) -> tuple[int, bool, bool]:
        """How many new pages of each kind a sequence takes, and whether its last history and its last window page are copied."""
        new = self._table.num_pages(new_len) - len(pages.history)
        writes_into_last = new_len > seq_len and seq_len % self._table.page_tokens != 0
        copies_history = writes_into_last and self.history.owners[pages.history[-1]] > 1
        copies_window = writes_into_last and self.window.owners[pages.window[-1]] > 1
        return new, copies_history, copies_window

    def can_reserve(self, grant: PageGrant) -> bool:
        """Whether every page of a grant is free still."""
        return not any(self.history.owners[page] for page in grant.history_pages()) and not any(
            self.window.owners[page] for page in grant.window_pages()
        )

    def reserve(self, grants: Sequence[PageGrant]) -> None:
        """Take granted pages off the free lists."""
        for grant in grants:
            self.history.take(grant.history_pages())
            self.window.take(grant.window_pages())

    def withdraw(self, grant: PageGrant) -> None:
        """Give reserved pages back; in the reverse order, so that the next plan is granted the same."""
        for page in reversed(grant.history_pages()):
            self.history.release(page)
        for page in reversed(grant.window_pages()):
            self.window.release(page)

    def settle(self, pages: PageList, grant: PageGrant) -> None:
        """Give reserved pages to a sequence."""
        for free, held, copy, new in (
            (self.history, pages.history, grant.history_copy, grant.history),
            (self.window, pages.window, grant.window_copy, grant.window),
        ):
            if copy != NULL_PAGE:
                free.release(held[-1])
                held[-1] = copy
            held.extend(new)

    def share(self, pages: PageList) -> PageList:
        """The same pages with one more owner."""
        for page in pages.history:
            self.history.share(page)
        for page in pages.window:
            if page != NULL_PAGE:
                self.window.share(page)
        return PageList(list(pages.history), list(pages.window))

    def release_window(self, pages: PageList, needed: range) -> None:
        """Release the window pages before the first of the page numbers that are needed."""
        for index in range(min(needed.start, len(pages.window)) - 1, -1, -1):
            if pages.window[index] == NULL_PAGE:
                return  # pages are released oldest first
            self.window.release(pages.window[index])
            pages.window[index] = NULL_PAGE

    def shorten(self, pages: PageList, seq_len: int) -> None:
        """Release the pages that hold no token before ``seq_len``."""
        while len(pages.history) > self._table.num_pages(seq_len):
            self.history.release(pages.history.pop())
            page = pages.window.pop()
            if page != NULL_PAGE:
                self.window.release(page)

    def release(self, pages: PageList) -> None:
        """Release every page of a sequence."""
        self.shorten(pages, 0)
