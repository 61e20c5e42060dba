"""The contract of an attention implementation."""

from abc import ABC, abstractmethod

import torch

from dsv4_kernels.step import StepTensors
from sglang_dsv4.attention.host_lengths import HostLengths
from sglang_dsv4.attention.row_list_kinds import kind_of
from sglang_dsv4.cache import CompressedKVCache, ExternalKVCache, LayerCache, StepPlan


class Attention(ABC):
    """Attends the new tokens of a step to the rows that a cache names.

    ``begin`` runs once per step, on the host, before the first layer; ``run`` once per layer, after that layer's ``append``.

    Args:
        cache (CompressedKVCache | ExternalKVCache): whose layers ``run`` gets.
        bf16_heads (int | None): for kernels that take bf16 queries of one number of heads: that number; None for any queries.

    Attributes:
        kinds (tuple[ListKind, ...]): by layer, which rows its queries attend to.
        distinct_kinds (tuple[ListKind, ...]): each of these once; layers of one kind share lists and schedule.
        sm_scale (float): softmax scale, ``head_dim ** -0.5``.
    """

    name: str
    _plan: StepPlan  # of the step that was begun

    def __init__(self, cache: CompressedKVCache | ExternalKVCache, bf16_heads: int | None = None) -> None:
        self.spec = cache.spec
        self.device = cache.device
        self._bf16_heads = bf16_heads
        self.kinds = tuple(kind_of(cache.spec, layer) for layer in cache.spec.layers)
        self.distinct_kinds = tuple(dict.fromkeys(self.kinds))
        self.sm_scale: float = cache.spec.head_dim**-0.5

    @property
    def capture_fault(self) -> str:
        """Why a CUDA graph cannot hold ``begin`` and ``run``; empty where it can."""
        return ""

    @property
    def needs_host_lengths(self) -> bool:
        """Whether ``begin`` needs the step's lengths on the host."""
        return False

    @property
    def numbering(self) -> StepTensors | None:
        """The step over the tables that number the rows which ``run`` attends to; None where they are the pool's.

        Selected rows must be of this numbering: `LayerCache.select` takes it.
        """
        return None

    def buffers(self) -> dict[int, int]:
        """Bytes of the buffers that it keeps from step to step, by address; others may share them."""
        return {}

    @abstractmethod
    def begin(self, plan: StepPlan, lengths: HostLengths | None = None) -> None:
        """Start a step; every later ``run`` belongs to it.

        Args:
            plan (StepPlan): the step.
            lengths (HostLengths | None): the step's lengths, where `needs_host_lengths`. A plan of a cache that owns its pages
                knows them by itself.

        Raises:
            ValueError: the step or its lengths do not fit the implementation.
        """

    def run(
        self,
        layer: LayerCache,
        q: torch.Tensor,
        sink: torch.Tensor,
        selected: torch.Tensor | None = None,
        *,
        undo_rope: bool = False,
    ) -> torch.Tensor:
        """Attend one layer's queries.

        Args:
            layer (LayerCache): the layer, whose parts of this step are appended.
            q (torch.Tensor): ``[T, H, 512]``, normed and rotated.
            sink (torch.Tensor): ``[H]``, sink logits.
            selected (torch.Tensor | None): rows from `LayerCache.select` by `numbering`, int32 or int64; CSA layers only.
            undo_rope (bool): rotate the last 64 channels of the result back, by each query's position.

        Returns:
            torch.Tensor: ``[T, H, 512]`` in ``q.dtype``. Without ``undo_rope`` it still carries the rotation of the rows'
            last 64 channels, which the caller undoes.

        Raises:
            ValueError: ``selected`` missing or unexpected, or a shape or dtype that does not fit.
        """
        self._check(layer, q, selected)
        return self._attend(layer, q, sink, selected, undo_rope)

    @abstractmethod
    def _attend(
        self, layer: LayerCache, q: torch.Tensor, sink: torch.Tensor, selected: torch.Tensor | None, undo_rope: bool
    ) -> torch.Tensor:
        """`run`, of arguments that fit."""

    def selected_buffer(self, layer: LayerCache) -> torch.Tensor | None:
        """Where chosen rows may be written so that ``run`` need not copy them.

        Returns:
            torch.Tensor | None: ``[T, K]`` int32, a view with gaps between its rows, for this step's ``run`` of a CSA layer; None
            where there is no such place. Of a query's row only the columns of its entries may be written; the others belong to
            its window.
        """
        del layer
        return None

    def _check(self, layer: LayerCache, q: torch.Tensor, selected: torch.Tensor | None) -> None:
        name, plan = f"layer {layer.layer_id}", self._plan
        if (self.kinds[layer.layer_id].most is not None) != (selected is not None):
            got = "none" if selected is None else "some"
            raise ValueError(f"{name}: expected selected rows exactly in CSA layers, got {got}")
        for what, tensor in (("q", q), ("selected rows", selected)):
            if tensor is not None and tensor.shape[0] != plan.num_tokens:
                raise ValueError(f"{name} {what}: expected {plan.num_tokens} tokens, got {tensor.shape[0]}")
        if self._bf16_heads is None:
            return
        if q.dtype != torch.bfloat16 or q.shape[1:] != (self._bf16_heads, self.spec.head_dim):
            raise ValueError(
                f"{name} q: expected bfloat16 [T, {self._bf16_heads}, {self.spec.head_dim}], got {q.dtype} {tuple(q.shape)}"
            )
