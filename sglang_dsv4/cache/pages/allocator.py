"""Who owns which page.

A sequence's tokens fall into pages of ``page_tokens``. Each has a *history page* (entries and index keys, kept as long
as the sequence) and a *window page* (window rows and boundary state, kept while a query can still reach it).
`PageAllocator` gives pages out itself, and lets sequences share them until one of them writes. `ExternalPages` reads
another owner's tables: SGLang's allocator, radix tree and eviction keep working on the same pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from sglang_dsv4.cache.storage import Capacity
from sglang_dsv4.errors import OutOfPagesError

NULL_PAGE = -1


@dataclass(frozen=True)
class PageTables:
    """Pages of a batch: ``history`` and ``window``, each ``[B, P]`` int64; `NULL_PAGE` where there is none."""

    history: torch.Tensor
    window: torch.Tensor


class PageOwner(Protocol):
    """What a cache asks of a page owner."""

    @property
    def capacity(self) -> Capacity:
        """Pages and state slots that exist, used or not."""

    def counts(self) -> dict[str, int]:
        """Pages and slots, by name: total and free, where the owner knows them."""


@dataclass
class PageList:
    """Pages of one sequence. Page ``k`` holds tokens ``k*page_tokens ..``; released window pages are `NULL_PAGE`."""

    history: list[int] = field(default_factory=list)
    window: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class PageGrant:
    """Pages that a plan takes for one sequence.

    Attributes:
        history (tuple[int, ...]): new history pages, appended to the sequence's.
        window (tuple[int, ...]): new window pages, likewise.
        history_copy (int): page that replaces the last history page, which is part full and shared; or `NULL_PAGE`.
        window_copy (int): likewise of the last window page.
    """

    history: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    history_copy: int = NULL_PAGE
    window_copy: int = NULL_PAGE

    def history_pages(self) -> tuple[int, ...]:
        """Every history page it names, in the order in which they are taken."""
        return _with_copy(self.history_copy, self.history)

    def window_pages(self) -> tuple[int, ...]:
        """Every window page it names, likewise."""
        return _with_copy(self.window_copy, self.window)


def _with_copy(copy: int, new: tuple[int, ...]) -> tuple[int, ...]:
    return new if copy == NULL_PAGE else (copy, *new)


class FreeList:
    """Numbers ``0 .. size-1``: which are free, in the fixed order in which they are handed out, and owners of the rest."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.free = list(range(size - 1, -1, -1))
        self.owners = [0] * size

    def peek(self, skip: int, count: int) -> tuple[int, ...]:
        """The ``count`` numbers that come after the next ``skip`` ones; changes nothing.

        Raises:
            OutOfPagesError: not that many are free.
        """
        if skip + count > len(self.free):
            raise OutOfPagesError(
                f"{self.name}: expected {skip + count} free, got {len(self.free)} of {self.size}; nothing was changed"
            )
        end = len(self.free) - skip
        return tuple(reversed(self.free[end - count : end]))

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


class _Reservation:
    """Numbers named so far from a free list that stays unchanged."""

    def __init__(self, source: FreeList) -> None:
        self._source = source
        self._named = 0

    def name(self, count: int) -> tuple[int, ...]:
        numbers = self._source.peek(self._named, count)
        self._named += count
        return numbers


class PageAllocator:
    """The cache's own owner: free lists of history pages, window pages and state slots."""

    def __init__(self, capacity: Capacity, page_tokens: int) -> None:
        self._capacity = capacity
        self.page_tokens = page_tokens
        self.history = FreeList("history pages", capacity.history_pages)
        self.window = FreeList("window pages", capacity.window_pages)
        self.slots = FreeList("state slots", capacity.state_slots)

    @property
    def capacity(self) -> Capacity:
        return self._capacity

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
        history, window = _Reservation(self.history), _Reservation(self.window)
        return [self._grant(pages, seq_len, new_len, history, window) for pages, seq_len, new_len in sequences]

    def _grant(self, pages: PageList, seq_len: int, new_len: int, history: _Reservation, window: _Reservation) -> PageGrant:
        count = -(-new_len // self.page_tokens) - len(pages.history)
        writes_into_last = new_len > seq_len and seq_len % self.page_tokens != 0
        copies_history = writes_into_last and self.history.owners[pages.history[-1]] > 1
        copies_window = writes_into_last and self.window.owners[pages.window[-1]] > 1
        return PageGrant(
            history_copy=history.name(1)[0] if copies_history else NULL_PAGE,
            window_copy=window.name(1)[0] if copies_window else NULL_PAGE,
            history=history.name(count),
            window=window.name(count),
        )

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

    def release_window(self, pages: PageList, first_needed: int) -> None:
        """Release the window pages that end before position ``first_needed``."""
        past = min(max(first_needed, 0) // self.page_tokens, len(pages.window))
        for index in range(past - 1, -1, -1):
            if pages.window[index] == NULL_PAGE:
                return  # pages are released oldest first
            self.window.release(pages.window[index])
            pages.window[index] = NULL_PAGE

    def shorten(self, pages: PageList, seq_len: int) -> None:
        """Release the pages that hold no token before ``seq_len``."""
        while len(pages.history) > -(-seq_len // self.page_tokens):
            self.history.release(pages.history.pop())
            page = pages.window.pop()
            if page != NULL_PAGE:
                self.window.release(page)

    def release(self, pages: PageList) -> None:
        """Release every page of a sequence."""
        self.shorten(pages, 0)


class ExternalPages:
    """Pages owned by somebody else, who passes tables with each step."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def counts(self) -> dict[str, int]:
        return {
            "history_pages": self._capacity.history_pages,
            "window_pages": self._capacity.window_pages,
            "state_slots": self._capacity.state_slots,
        }


def _planned(held: list[int], copy: int, new: tuple[int, ...]) -> list[int]:
    kept = held if copy == NULL_PAGE else [*held[:-1], copy]
    return [*kept, *new]


def stack_tables(sequences: Sequence[tuple[PageList, PageGrant]], device: torch.device) -> PageTables:
    """Tables of sequences as they will be once their grants are taken."""
    width = max((len(pages.history) + len(grant.history) for pages, grant in sequences), default=0)

    def stack(rows: list[list[int]]) -> torch.Tensor:
        padded = [row + [NULL_PAGE] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=device).view(len(rows), width)

    return PageTables(
        history=stack([_planned(pages.history, grant.history_copy, grant.history) for pages, grant in sequences]),
        window=stack([_planned(pages.window, grant.window_copy, grant.window) for pages, grant in sequences]),
    )
