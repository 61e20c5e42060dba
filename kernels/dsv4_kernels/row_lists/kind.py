"""How long the list of rows is that a query attends to."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ListKind:
    """Lists of one kind of layer: a query's entries, then its window rows, so that chosen entries can be written in place.

    A length is a function of the query's position alone, so host and device know it without asking each other. A query of
    position -1 is padding; its list is empty.

    Attributes:
        name (str): ``"window"``, ``"csa"`` or ``"hca"``.
        window (int): window rows at most.
        ratio (int): tokens per entry; 0 where no entries are listed.
        most (int | None): entries at most, where they are chosen (CSA); None where every visible one is listed.
    """

    name: str
    window: int
    ratio: int = 0
    most: int | None = None

    def num_window(self, positions: torch.Tensor) -> torch.Tensor:
        """Window rows of each query, its own row included."""
        return (positions + 1).clamp_max(self.window)

    def num_entries(self, positions: torch.Tensor) -> torch.Tensor:
        """Entries of each query: a block's last token sees the block's entry."""
        if not self.ratio:
            return torch.zeros_like(positions)
        visible = (positions + 1) // self.ratio
        return visible if self.most is None else visible.clamp_max(self.most)

    def lengths(self, positions: torch.Tensor) -> torch.Tensor:
        """Rows in each query's list."""
        return self.num_window(positions) + self.num_entries(positions)

    def width(self, max_seq_len: int) -> int:
        """Longest list of a query in a sequence of ``max_seq_len`` tokens."""
        visible = max_seq_len // self.ratio if self.ratio else 0
        return self.window + (visible if self.most is None else min(visible, self.most))
