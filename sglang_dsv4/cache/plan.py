"""What one step will do: built on the host, spent once."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from dsv4_kernels.step import StepTensors
from sglang_dsv4.cache.pages.allocator import PageGrant
from sglang_dsv4.cache.pages.request import Request


@dataclass(frozen=True)
class PlannedRequest:
    """One request's share of a plan."""

    request: Request
    num_new_tokens: int
    grant: PageGrant


@dataclass(frozen=True)
class RowCopies:
    """Rows of shared pages that a step copies before it writes into them, by the old and the new row.

    Attributes:
        window (tuple[torch.Tensor, torch.Tensor]): window rows of a row pool, ``[N]`` int64 each.
        boundary (tuple[torch.Tensor, torch.Tensor]): window pages, whose boundary state goes with them.
        history (dict[int, tuple[torch.Tensor, torch.Tensor]]): by ratio, rows of an index-key pool; also rows among a row
            pool's entries.
    """

    window: tuple[torch.Tensor, torch.Tensor]
    boundary: tuple[torch.Tensor, torch.Tensor]
    history: dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One step of a batch.

    Attributes:
        step (StepTensors): what kernels see.
        window (int): raw rows a query attends to.
        items (tuple[PlannedRequest, ...]): requests and their page grants; empty when pages are owned elsewhere.
        epoch (int): the cache's epoch when the plan was made.
        owner (object): the cache that made the plan; no other takes it.
        copies (RowCopies | None): what copy-on-write moves; None where nothing is shared.
        appended (set[tuple[int, str]]): (layer, part) pairs that were appended so far.
    """

    step: StepTensors
    window: int
    items: tuple[PlannedRequest, ...] = ()
    epoch: int = 0
    owner: object = None
    copies: RowCopies | None = None
    appended: set[tuple[int, str]] = field(default_factory=set)

    @property
    def num_tokens(self) -> int:
        """New tokens of the step."""
        return len(self.step.positions)

    @cached_property
    def _unpadded_step(self) -> tuple[StepTensors, torch.Tensor] | None:
        """The step without its padding, and which tokens stay; None where all do."""
        real = self.step.positions >= 0
        if bool(real.all()):
            return None
        positions, rows = self.step.positions[real], self.step.token_rows[real]
        return replace(self.step, positions=positions, token_rows=rows), real

    def unpadded(self, inputs: torch.Tensor) -> tuple[StepTensors, torch.Tensor]:
        """The step and a part's input without padding, which asks the device; kernels pass over padding themselves."""
        if self._unpadded_step is None:
            return self.step, inputs
        step, real = self._unpadded_step
        return step, inputs[real]

    @cached_property
    def window_indices(self) -> torch.Tensor:
        """Pool rows of each token's window, its own row included: ``[T, window]`` int64, -1 at the end."""
        positions = self.step.positions.unsqueeze(1)  # [T, 1]
        first = (positions - self.window + 1).clamp_min(0)
        reached = first + torch.arange(self.window, device=positions.device)
        slots = self.step.window_slots(self.step.token_rows.unsqueeze(1), reached.minimum(positions))
        return slots.masked_fill(reached > positions, -1)

    def num_visible(self, ratio: int) -> torch.Tensor:
        """Entries each token may attend to: ``(position + 1) // ratio``, ``[T]`` int64.

        The token that completes a block sees that block's entry.
        """
        return (self.step.positions + 1) // ratio

    def entry_indices(self, entries: torch.Tensor, ratio: int) -> torch.Tensor:
        """Pool rows of chosen entries: ``[T, K]`` entry numbers, -1 for none, to ``[T, K]`` rows, -1 for none."""
        if entries.shape[1] == 0:
            return entries
        slots = self.step.entry_slots(self.step.token_rows.unsqueeze(1), entries.clamp_min(0), ratio)
        return slots.masked_fill(entries < 0, -1)

    def visible_entries(self, ratio: int) -> torch.Tensor:
        """Every entry each token may attend to: ``[T, most]`` int64 entry numbers, -1 at the end."""
        visible = self.num_visible(ratio).unsqueeze(1)
        most = int(visible.max()) if len(visible) else 0
        entries = torch.arange(most, device=visible.device).expand(len(visible), most)
        return entries.masked_fill(entries >= visible, -1)

    @cached_property
    def _every_entry(self) -> dict[int, torch.Tensor]:
        return {}

    def every_entry_indices(self, ratio: int) -> torch.Tensor:
        """Pool rows of `visible_entries`, computed once per step and ratio."""
        if ratio not in self._every_entry:
            self._every_entry[ratio] = self.entry_indices(self.visible_entries(ratio), ratio)
        return self._every_entry[ratio]
