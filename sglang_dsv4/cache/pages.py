"""Who owns which page.

A sequence's tokens fall into pages of ``page_tokens``. Each has a *history page* (entries and index keys, kept as long
as the sequence) and a *window page* (window rows and boundary state, kept while a query can still reach it).
`PageAllocator` gives pages out itself. `ExternalPages` reads another owner's tables: SGLang's allocator, radix tree and
eviction keep working on the same pages.
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
    """Pages that a plan will take for one sequence when it is committed."""

    history: tuple[int, ...]
    window: tuple[int, ...]


class _FreeList:
    """Free numbers ``0 .. size-1``, handed out in a fixed order, and how many owners each has."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.free = list(range(size - 1, -1, -1))
        self.owners = [0] * size

    def peek(self, skip: int, count: int) -> tuple[int, ...]:
        """The ``count`` numbers that come after the next ``skip`` ones; changes nothing."""
        if skip + count > len(self.free):
            raise OutOfPagesError(
                f"{self.name}: expected {skip + count} free, got {len(self.free)} of {self.size}; nothing was changed"
            )
        end = len(self.free) - skip
        return tuple(reversed(self.free[end - count : end]))

    def take(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            taken = self.free.pop()
            assert taken == number, (
                f"{self.name}: plan granted {number}, the free list gives {taken}"
            )
            self.owners[number] = 1

    def release(self, number: int) -> None:
        self.owners[number] -= 1
        if self.owners[number] == 0:
            self.free.append(number)


class PageAllocator:
    """The cache's own owner: free lists of history pages, window pages and state slots."""

    def __init__(self, capacity: Capacity, page_tokens: int) -> None:
        self._capacity = capacity
        self.page_tokens = page_tokens
        self.history = _FreeList("history pages", capacity.history_pages)
        self.window = _FreeList("window pages", capacity.window_pages)
        self.slots = _FreeList("state slots", capacity.state_slots)

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def counts(self) -> dict[str, int]:
        return {
            "history_pages": self.history.size,
            "history_pages_free": len(self.history.free),
            "window_pages": self.window.size,
            "window_pages_free": len(self.window.free),
            "state_slots": self.slots.size,
            "state_slots_free": len(self.slots.free),
        }

    def grant(self, sequences: Sequence[tuple[PageList, int]]) -> list[PageGrant]:
        """Pages each sequence needs to reach a length; changes nothing.

        Args:
            sequences (Sequence[tuple[PageList, int]]): each sequence's pages, and the tokens it must hold.

        Raises:
            OutOfPagesError: not enough free pages for all of them together.
        """
        grants, taken = [], 0
        for pages, seq_len in sequences:
            count = -(-seq_len // self.page_tokens) - len(pages.history)
            grants.append(
                PageGrant(self.history.peek(taken, count), self.window.peek(taken, count))
            )
            taken += count
        return grants

    def take(self, pages: PageList, grant: PageGrant) -> None:
        """Give the granted pages to a sequence, in the order in which they were granted."""
        self.history.take(grant.history)
        self.window.take(grant.window)
        pages.history.extend(grant.history)
        pages.window.extend(grant.window)

    def release_window(self, pages: PageList, first_needed: int) -> None:
        """Free the window pages that end before position ``first_needed``."""
        for index in range(
            min(max(first_needed, 0) // self.page_tokens, len(pages.window)) - 1, -1, -1
        ):
            if pages.window[index] == NULL_PAGE:
                return  # pages are released oldest first
            self.window.release(pages.window[index])
            pages.window[index] = NULL_PAGE

    def release(self, pages: PageList) -> None:
        """Free every page of a sequence."""
        for page in pages.history:
            self.history.release(page)
        for page in pages.window:
            if page != NULL_PAGE:
                self.window.release(page)
        pages.history.clear()
        pages.window.clear()


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


def stack_tables(
    sequences: Sequence[tuple[PageList, PageGrant]], device: torch.device
) -> PageTables:
    """Tables of sequences as they will be once their grants are taken."""
    width = max((len(pages.history) + len(grant.history) for pages, grant in sequences), default=0)

    def stack(rows: list[list[int]]) -> torch.Tensor:
        padded = [row + [NULL_PAGE] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=device).view(len(rows), width)

    return PageTables(
        history=stack([[*pages.history, *grant.history] for pages, grant in sequences]),
        window=stack([[*pages.window, *grant.window] for pages, grant in sequences]),
    )
