"""What one step will do: built on the host, spent once."""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from dsv4_kernels.step import StepTensors
from sglang_dsv4.cache.pages.request import Request
from sglang_dsv4.cache.pages.tables import PageGrant
from sglang_dsv4.cache.regions import Kind, Part
from sglang_dsv4.cache.step_rows import StepRows


@dataclass(frozen=True)
class PlannedRequest:
    """One request's share of a plan."""

    request: Request
    num_new_tokens: int
    grant: PageGrant


@dataclass(frozen=True)
class RowCopies:
    """Rows of shared pages that a step copies before it writes into them.

    Attributes:
        moves (dict[tuple[Kind, int], tuple[torch.Tensor, torch.Tensor]]): by `Region.places`, the old and the new rows, ``[N]``
            int64 each.
    """

    moves: dict[tuple[Kind, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(eq=False)
class StepPlan:
    """One step of a batch.

    Attributes:
        step (StepTensors): what kernels see.
        window (int): raw rows a query attends to.
        owner (object): the cache that made the plan; no other takes it.
        items (tuple[PlannedRequest, ...]): requests and their page grants; empty when pages are owned elsewhere.
        epoch (int): the cache's epoch when the plan was made.
        copies (RowCopies | None): what copy-on-write moves; None where nothing is shared.
        copied (set[int]): layers whose shared rows were copied.
        started (set[tuple[int, Part]]): what layers have begun to write.
        appended (set[tuple[int, Part]]): what they have written whole.
        is_given_up (bool): an abandon of it has begun, so that its requests' state may be that of before.
    """

    step: StepTensors
    window: int
    owner: object
    items: tuple[PlannedRequest, ...] = ()
    epoch: int = 0
    copies: RowCopies | None = None
    copied: set[int] = field(default_factory=set)
    started: set[tuple[int, Part]] = field(default_factory=set)
    appended: set[tuple[int, Part]] = field(default_factory=set)
    is_given_up: bool = False

    @property
    def num_tokens(self) -> int:
        """New tokens of the step."""
        return self.step.positions.shape[0]

    @cached_property
    def rows(self) -> StepRows:
        """The rows that the step's queries read, for references in PyTorch."""
        return StepRows(self.step, self.window)
