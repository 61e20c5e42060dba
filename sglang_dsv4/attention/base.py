"""The contract of an attention implementation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsv4_kernels.step import StepTensors
from sglang_dsv4.cache import CompressedKVCache, ExternalKVCache, StepPlan


@dataclass(frozen=True)
class HostLengths:
    """What the host knows of a step's lengths: the numbers of `StepTensors`, without asking the device.

    Attributes:
        seq_lens (Sequence[int]): tokens per request, this step included.
        extend_lens (Sequence[int]): new tokens per request.
    """

    seq_lens: Sequence[int]
    extend_lens: Sequence[int]

    def positions(self) -> torch.Tensor:
        """Position of each new token: ``[T]`` int64 on the CPU."""
        ranges = [torch.arange(end - count, end) for end, count in zip(self.seq_lens, self.extend_lens, strict=True)]
        return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)


class Attention(ABC):
    """Attends the new tokens of a step to the rows that a cache names.

    ``plan`` runs once per step, on the host, before the first layer; ``run`` once per layer, after that layer's ``append``.
    """

    name: str

    @property
    def capture_fault(self) -> str:
        """Why a CUDA graph cannot hold ``plan`` and ``run``; empty where it can."""
        return ""

    @property
    def plans_on_host(self) -> bool:
        """Whether ``plan`` needs the step's lengths on the host."""
        return False

    @property
    def numbering(self) -> StepTensors | None:
        """The planned step over the tables that number the rows which ``run`` attends to; None where they are the pool's.

        Selected rows must be of this numbering: `LayerCache.select` takes it.
        """
        return None

    def buffers(self) -> dict[int, int]:
        """Bytes of the buffers that it keeps from step to step, by address; others may share them."""
        return {}

    def __init__(self, cache: CompressedKVCache | ExternalKVCache) -> None:
        self.cache = cache
        self.sm_scale: float = cache.spec.head_dim**-0.5

    @abstractmethod
    def plan(self, plan: StepPlan, lengths: HostLengths | None = None) -> None:
        """Take a step's plan; every later ``run`` belongs to it.

        Args:
            plan (StepPlan): the step.
            lengths (HostLengths | None): the step's lengths, for an implementation that plans on the host. A plan of a cache
                that owns its pages knows them by itself.
        """

    @abstractmethod
    def run(
        self,
        layer_id: int,
        q: torch.Tensor,
        sink: torch.Tensor,
        selected: torch.Tensor | None = None,
        *,
        undo_rope: bool = False,
    ) -> torch.Tensor:
        """Attend one layer's queries.

        Args:
            layer_id (int): the layer, whose parts of this step are appended.
            q (torch.Tensor): ``[T, H, 512]``, normed and rotated.
            sink (torch.Tensor): ``[H]``, sink logits.
            selected (torch.Tensor | None): rows from `LayerCache.select` by `numbering`, int32 or int64; CSA layers
                only.
            undo_rope (bool): rotate the last 64 channels of the result back, by each query's position.

        Returns:
            torch.Tensor: ``[T, H, 512]`` in ``q.dtype``. Without ``undo_rope`` it still carries the rotation of the rows'
            last 64 channels, which the caller undoes.

        Raises:
            ValueError: ``selected`` missing or unexpected, or a shape that does not fit the plan.
        """

    def selected_buffer(self, layer_id: int) -> torch.Tensor | None:
        """Where chosen rows may be written so that ``run`` need not copy them.

        Returns:
            torch.Tensor | None: ``[T, K]`` int32, its rows apart, for this step's ``run`` of a CSA layer; None where there is no
            such place. Of a query's row only the columns of its entries may be written; others belong to its window.
        """
        del layer_id
        return None

    def check(self, layer_id: int, plan: StepPlan, q: torch.Tensor, selected: torch.Tensor | None) -> None:
        """Raise unless the arguments of ``run`` fit the layer and the plan."""
        if self.cache.spec.layers[layer_id].indexed != (selected is not None):
            got = "none" if selected is None else "some"
            raise ValueError(f"layer {layer_id}: expected selected rows exactly in CSA layers, got {got}")
        for name, tensor in (("q", q), ("selected rows", selected)):
            if tensor is not None and tensor.shape[0] != plan.num_tokens:
                raise ValueError(f"layer {layer_id} {name}: expected {plan.num_tokens} tokens, got {tensor.shape[0]}")
