"""Pages of sequences: lists of those they hold, what a plan adds to them, and tables of a batch.

A sequence's tokens fall into pages of ``page_tokens``. Each has a *history page* (entries and index keys, kept as long
as the sequence) and a *window page* (window rows and boundary state, kept while anything still needs it).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

NULL_PAGE = -1


@dataclass(frozen=True)
class PageTables:
    """Pages of a batch: ``history`` and ``window``, each ``[B, P]`` int64; `NULL_PAGE` where there is none."""

    history: torch.Tensor
    window: torch.Tensor


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
        window (tuple[int, ...]): new window pages, appended to the sequence's.
        history_copy (int): page that replaces the last history page, which is part full and shared; or `NULL_PAGE`.
        window_copy (int): page that replaces the last window page, for the same reason; or `NULL_PAGE`.
    """

    history: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    history_copy: int = NULL_PAGE
    window_copy: int = NULL_PAGE

    def history_pages(self) -> tuple[int, ...]:
        """Every history page it names, in the order in which they are taken."""
        return _with_copy(self.history_copy, self.history)

    def window_pages(self) -> tuple[int, ...]:
        """Every window page it names, in that order."""
        return _with_copy(self.window_copy, self.window)


def _with_copy(copy: int, new: tuple[int, ...]) -> tuple[int, ...]:
    return new if copy == NULL_PAGE else (copy, *new)


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
