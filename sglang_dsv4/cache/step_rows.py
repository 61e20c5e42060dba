"""The rows that a step's queries read, as plain index arithmetic: what PyTorch references need, and no kernel."""

from dataclasses import replace
from functools import cached_property

import torch

from dsv4_kernels.step import StepTensors


class StepRows:
    """Row numbers of one step's window rows and entries.

    Args:
        step (StepTensors): the step; ``T`` new tokens.
        window (int): window rows that a query attends to, its own included.
    """

    def __init__(self, step: StepTensors, window: int) -> None:
        self.step = step
        self._window = window
        self._every_entry: dict[int, torch.Tensor] = {}

    @cached_property
    def window(self) -> torch.Tensor:
        """Pool rows of each token's window, its own row included: ``[T, window]`` int64, -1 at the end."""
        positions = self.step.positions.unsqueeze(1)  # [T, 1]
        first = (positions - self._window + 1).clamp_min(0)
        reached = first + torch.arange(self._window, device=positions.device)
        slots = self.step.window_slots(self.step.token_rows.unsqueeze(1), reached.minimum(positions))
        return slots.masked_fill(reached > positions, -1)

    def num_visible(self, ratio: int) -> torch.Tensor:
        """Entries each token may attend to: ``(position + 1) // ratio``, ``[T]`` int64.

        The token that completes a block sees that block's entry.
        """
        return (self.step.positions + 1) // ratio

    def visible_entries(self, ratio: int) -> torch.Tensor:
        """Every entry each token may attend to: ``[T, most]`` int64 entry numbers, -1 at the end."""
        visible = self.num_visible(ratio).unsqueeze(1)
        most = int(visible.max()) if len(visible) else 0
        entries = torch.arange(most, device=visible.device).expand(len(visible), most)
        return entries.masked_fill(entries >= visible, -1)

    def entries(self, entries: torch.Tensor, ratio: int) -> torch.Tensor:
        """Pool rows of chosen entries: ``[T, K]`` entry numbers, -1 for none, to ``[T, K]`` rows, -1 for none."""
        if entries.shape[1] == 0:
            return entries
        slots = self.step.entry_slots(self.step.token_rows.unsqueeze(1), entries.clamp_min(0), ratio)
        return slots.masked_fill(entries < 0, -1)

    def every_entry(self, ratio: int) -> torch.Tensor:
        """Pool rows of `visible_entries`, computed once per ratio."""
        if ratio not in self._every_entry:
            self._every_entry[ratio] = self.entries(self.visible_entries(ratio), ratio)
        return self._every_entry[ratio]


def unpadded(step: StepTensors, values: torch.Tensor) -> tuple[StepTensors, torch.Tensor]:
    """The step and a part's input ``[T, width]`` without tokens of position -1, which kernels pass over themselves."""
    real = step.positions >= 0
    if bool(real.all()):
        return step, values
    return replace(step, positions=step.positions[real], token_rows=step.token_rows[real]), values[real]
