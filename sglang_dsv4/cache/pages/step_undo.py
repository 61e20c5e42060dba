"""Stream state as it was before a step, for as long as the step may be abandoned.

Everything else that a step writes lies where nothing committed does: behind the last token, or in pages of its own. Only
the rings of stream state are written over. They have room for ``max_draft_tokens`` tokens beside what a request needs, so
only a step with more tokens needs a copy.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from sglang_dsv4.cache.plan import PlannedRequest, StepPlan
from sglang_dsv4.spec import CacheSpec


@dataclass(frozen=True)
class _Kept:
    """The state of some requests: ``state`` has one ``[N, ...]`` tensor for every stream-state tensor."""

    rows: dict[int, int]  # req_id -> row
    state: tuple[torch.Tensor, ...]


class UndoCopies:
    """Copies of stream state, by the step that writes over it.

    Args:
        spec (CacheSpec): the cache's.
        state (Sequence[torch.Tensor]): every stream-state tensor, ``[state slots, ...]``.
    """

    def __init__(self, spec: CacheSpec, state: Sequence[torch.Tensor]) -> None:
        self._spec = spec
        self._state = tuple(state)
        self._kept: dict[StepPlan, _Kept] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the copies held now."""
        return sum(copy.nbytes for kept in self._kept.values() for copy in kept.state)

    def keep(self, plan: StepPlan) -> int:
        """Copy what a step will write over; returns how many bytes."""
        requests = [item.request for item in plan.items if self._is_overwritten(item)]
        if not requests:
            return 0
        slots = [request.state_slot for request in requests]
        self._kept[plan] = kept = _Kept(
            rows={request.req_id: row for row, request in enumerate(requests)},
            state=tuple(state[slots] for state in self._state),
        )
        return sum(copy.nbytes for copy in kept.state)

    def put_back(self, plan: StepPlan, item: PlannedRequest) -> bool:
        """Write back one request's copy; False where none was needed."""
        kept = self._kept.get(plan)
        row = None if kept is None else kept.rows.get(item.request.req_id)
        if kept is None or row is None:
            return False
        for state, copy in zip(self._state, kept.state, strict=True):
            state[item.request.state_slot] = copy[row]
        return True

    def drop_all_but(self, steps: Collection[StepPlan]) -> None:
        """Forget the copies of steps that are over."""
        self._kept = {plan: kept for plan, kept in self._kept.items() if plan in steps}

    def _is_overwritten(self, item: PlannedRequest) -> bool:
        return item.request.seq_len > 0 and item.num_new_tokens > self._spec.max_draft_tokens
