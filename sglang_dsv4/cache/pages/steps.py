"""Steps over pages that the cache owns: planned, begun, committed or taken back."""

from collections.abc import Iterable, Sequence

import torch

from dsv4_kernels.step import StepTensors
from sglang_dsv4.cache.layer import LayerCache
from sglang_dsv4.cache.pages.copy_on_write import copy_rows, plan_copies
from sglang_dsv4.cache.pages.request import Request
from sglang_dsv4.cache.pages.requests import Requests
from sglang_dsv4.cache.pages.step_books import StepBooks
from sglang_dsv4.cache.pages.step_undo import UndoCopies
from sglang_dsv4.cache.pages.tables import stack_tables
from sglang_dsv4.cache.plan import PlannedRequest, StepPlan
from sglang_dsv4.cache.storage import CacheStorage
from sglang_dsv4.errors import StalePlanError
from sglang_dsv4.spec import CacheSpec


class OwnedSteps:
    """`Steps` of a cache that owns its pages.

    Device work comes before the books change, so that what fails half way can be done again or taken back.

    Args:
        spec (CacheSpec): the cache's.
        requests (Requests): its sequences.
        storage (CacheStorage): its memory.
        device (torch.device): where that is.

    Attributes:
        undo (UndoCopies): stream state that steps under way may have to put back.
        bytes_copied (dict[str, int]): by ``copy_on_write`` and ``undo``, since the cache was made.
    """

    def __init__(self, spec: CacheSpec, requests: Requests, storage: CacheStorage, device: torch.device) -> None:
        self.undo = UndoCopies(spec, storage.stream_state)
        self.bytes_copied = {"copy_on_write": 0, "undo": 0}
        self._spec = spec
        self._requests = requests
        self._books = StepBooks(requests, spec.max_draft_tokens)
        self._storage = storage
        self._device = device

    def plan(self, items: Sequence[tuple[Request, int]]) -> StepPlan:
        """`CompressedKVCache.plan`."""
        planned = self._books.grant(items)
        return StepPlan(
            step=self._step_tensors(planned),
            window=self._spec.window,
            owner=self,
            items=planned,
            epoch=self._requests.epoch,
            copies=plan_copies(self._storage.table, planned, self._device),
        )

    def check(self, plan: StepPlan) -> None:
        """Raise unless the plan is of this cache and can be appended, or appended further, and committed."""
        self._check_owner(plan)
        self._books.check(plan)

    def begin(self, plan: StepPlan, layer: LayerCache | None = None) -> None:
        """Hold the step's pages, keep what `abandon` will need, and copy what the layer shares with other sequences."""
        if not self._books.is_begun(plan):
            self.bytes_copied["undo"] += self.undo.keep(plan)
            self._books.begin(plan)
        if layer is not None and plan.copies is not None and layer.layer_id not in plan.copied:
            self.bytes_copied["copy_on_write"] += copy_rows(plan.copies, layer.memory.storage.regions)
            plan.copied.add(layer.layer_id)

    def commit(self, plan: StepPlan, layers: Iterable[LayerCache]) -> None:
        """`CompressedKVCache.commit`."""
        self.check(plan)
        missing = [
            f"{layer.layer_id} {part.value}"
            for layer in layers
            for part in layer.parts
            if (layer.layer_id, part) not in plan.appended
        ]
        if missing and plan.num_tokens:
            raise StalePlanError(f"commit: expected every part of every layer appended, missing layer {', '.join(missing)}")
        self.begin(plan)
        self._books.commit(plan)

    def abandon(self, plan: StepPlan) -> None:
        """`CompressedKVCache.abandon`."""
        self._check_owner(plan)
        if not self._books.is_begun(plan):
            if plan.started:
                raise StalePlanError(
                    "plan: expected one that was appended and is under way, got one that was committed or abandoned, "
                    "or whose requests are all closed"
                )
            return
        items = self._books.items_of(plan)
        plan.is_given_up = True
        put_back = [self.undo.put_back(plan, item) for item in items]
        self._books.abandon(plan)
        for item, was_overwritten in zip(items, put_back, strict=True):
            if not was_overwritten:
                self._books.narrow(item)

    def _check_owner(self, plan: StepPlan) -> None:
        if plan.owner is not self:
            raise StalePlanError("plan: expected one of this cache, got another cache's")

    def _step_tensors(self, planned: Sequence[PlannedRequest]) -> StepTensors:
        tables = stack_tables([(item.request.pages, item.grant) for item in planned], self._device)
        begins = torch.tensor([item.request.seq_len for item in planned], dtype=torch.int64)
        counts = torch.tensor([item.num_new_tokens for item in planned], dtype=torch.int64)
        rows = torch.repeat_interleave(torch.arange(len(planned)), counts)
        offsets = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        return StepTensors(
            positions=(begins[rows] + offsets).to(self._device),
            token_rows=rows.to(self._device),
            seq_lens=(begins + counts).to(self._device),
            extend_lens=counts.to(self._device),
            state_slots=torch.tensor([item.request.state_slot for item in planned], dtype=torch.int64).to(self._device),
            history_pages=tables.history,
            window_pages=tables.window,
            page_tokens=self._spec.page_tokens,
            num_window_rows=self._storage.num_window_rows,
        )
