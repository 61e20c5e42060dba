"""The step whose layers are running."""

from typing import Any

import torch

from sglang_dsv4.attention import Attention
from sglang_dsv4.cache import StepPlan
from sglang_dsv4.errors import StalePlanError


class RunningStep:
    """What the layers of one step share.

    SGLang's model calls the pool for window rows and the backend for everything else, several times a layer, and passes on
    nothing that an earlier call returned. So the two share this object: the backend begins a step, and every later call of
    either belongs to that step. The calls of a layer come together, one layer after the other; hence one place each for
    what one of them leaves to a later one.

    Attributes:
        kept (torch.Tensor | None): what another stream may still read; held until the next layer or step, before which SGLang
            has joined that stream.
        early (Any): SGLang's main Compressor whose tokens were taken in with the indexer's, before SGLang calls for it.
    """

    def __init__(self) -> None:
        self._begun: tuple[StepPlan, Attention] | None = None
        self._selected: tuple[int, torch.Tensor] | None = None
        self.kept: torch.Tensor | None = None
        self.early: Any = None

    @property
    def is_running(self) -> bool:
        """Whether a step has begun that has not ended."""
        return self._begun is not None

    @property
    def plan(self) -> StepPlan:
        """The step's plan.

        Raises:
            StalePlanError: no step is running.
        """
        return self._running()[0]

    @property
    def attention(self) -> Attention:
        """Attention, planned for the step; errors as of `plan`."""
        return self._running()[1]

    def begin(self, plan: StepPlan, attention: Attention) -> None:
        """From now on every layer's call belongs to this step."""
        self.end()
        self._begun = plan, attention

    def end(self) -> None:
        """No step is running: an idle one has no layers, and one that cannot be planned leaves nothing of the last one."""
        self._begun = self._selected = self.kept = self.early = None

    def choose(self, layer_id: int, rows: torch.Tensor) -> None:
        """Leave a layer's chosen entries to its attention."""
        self._selected = layer_id, rows

    def chosen(self, layer_id: int) -> torch.Tensor | None:
        """A layer's chosen entries, handed out once; None where it has chosen none."""
        found, self._selected = self._selected, None
        return None if found is None or found[0] != layer_id else found[1]

    def _running(self) -> tuple[StepPlan, Attention]:
        if self._begun is None:
            raise StalePlanError("plan: expected init_forward_metadata before the first layer, got none")
        return self._begun
