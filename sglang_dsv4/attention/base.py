"""The contract of an attention implementation."""

from abc import ABC, abstractmethod

import torch

from sglang_dsv4.cache import CompressedKVCache, StepPlan


class Attention(ABC):
    """Attends the new tokens of a step to the rows that a cache names.

    ``plan`` runs once per step, on the host, before the first layer; ``run`` once per layer, after that layer's ``append``.
    """

    name: str

    def __init__(self, cache: CompressedKVCache) -> None:
        self.cache = cache
        self.sm_scale: float = cache.spec.head_dim**-0.5

    @abstractmethod
    def plan(self, plan: StepPlan) -> None:
        """Take a step's plan; every later ``run`` belongs to it."""

    @abstractmethod
    def run(
        self,
        layer_id: int,
        q: torch.Tensor,
        sink: torch.Tensor,
        selected: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend one layer's queries.

        Args:
            layer_id (int): the layer, whose parts of this step are appended.
            q (torch.Tensor): ``[T, H, 512]``, normed and rotated.
            sink (torch.Tensor): ``[H]``, sink logits.
            selected (torch.Tensor | None): rows from `CompressedKVCache.select`; CSA layers only.

        Returns:
            torch.Tensor: ``[T, H, 512]`` in ``q.dtype``; still carries the rotation of the rows' last 64 channels, which
            the caller undoes at each query's position.

        Raises:
            ValueError: ``selected`` missing or unexpected, or a shape that does not fit the plan.
        """
