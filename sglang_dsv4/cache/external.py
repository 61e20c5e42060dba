"""The cache over pages that somebody else owns: SGLang's allocator, radix tree and eviction keep working on them."""

import torch

from dsv4_kernels.step import StepTensors
from sglang_dsv4.cache.choose_kernels import make_kernels
from sglang_dsv4.cache.inspect.report import CacheReport, build_report
from sglang_dsv4.cache.kernels import LayerMemory
from sglang_dsv4.cache.layer import LayerCache
from sglang_dsv4.cache.plan import StepPlan
from sglang_dsv4.cache.storage import CacheStorage, Capacity
from sglang_dsv4.errors import StalePlanError
from sglang_dsv4.spec import CacheSpec


class _ExternalSteps:
    """`Steps` of a cache whose pages are held by somebody else: only a plan's owner is checked."""

    def check(self, plan: StepPlan) -> None:
        if plan.owner is not self:
            raise StalePlanError("plan: expected one of this cache, got another cache's")

    def begin(self, plan: StepPlan, layer: LayerCache) -> None:
        return None


class ExternalKVCache:
    """The rows, keys and state of `CompressedKVCache`, addressed by page tables that come with each step.

    A step is ``plan``, then for every layer `LayerCache.append`, `LayerCache.select` and attention. There is nothing to commit.
    A sequence may start at any page boundary, with all earlier pages complete; its state slot needs no reset.

    Args:
        spec (CacheSpec): from `CacheSpec.from_hf`.
        capacity (Capacity): pages and slots that exist.
        device (torch.device | str): where the memory lives.
        kernels (str): as for `CompressedKVCache`.
        index_heads (int | None): heads of the indexer; its scratch is allocated at once where they are given.

    Attributes:
        layers (tuple[LayerCache, ...]): by layer.
        storage (CacheStorage): the tensors.
    """

    def __init__(
        self,
        spec: CacheSpec,
        capacity: Capacity,
        device: torch.device | str = "cpu",
        kernels: str = "auto",
        index_heads: int | None = None,
    ) -> None:
        self.spec = spec
        self.capacity = capacity
        self.device = torch.device(device)
        self.kernels = make_kernels(kernels, spec, capacity, self.device, index_heads)
        self.storage = CacheStorage(spec, capacity, self.device)
        self._steps = _ExternalSteps()
        self.layers = tuple(
            LayerCache(LayerMemory(spec, layer, memory, self.storage.rope_tables[layer.rope]), self.kernels, self._steps)
            for layer, memory in zip(spec.layers, self.storage.layers, strict=True)
        )

    def plan(self, step: StepTensors) -> StepPlan:
        """The plan of a step whose tensors are filled, or will be before its layers run; its page tables are the owner's."""
        return StepPlan(step=step, window=self.spec.window, owner=self._steps)

    def report(self) -> CacheReport:
        """Where the bytes are; equal to what is really allocated."""
        counts = {
            "history_pages": self.capacity.history_pages,
            "window_pages": self.capacity.window_pages,
            "state_slots": self.capacity.state_slots,
        }
        return build_report(self.spec, self.storage, self.capacity, counts, {"scratch": self.kernels.nbytes})
