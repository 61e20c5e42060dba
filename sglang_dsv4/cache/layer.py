"""One layer of a cache: the handle that a model's layer writes through, and that attention reads."""

from collections.abc import Callable
from typing import Protocol

import torch

from dsv4_kernels.layout import RowFormat
from dsv4_kernels.step import StepTensors
from dsv4_kernels.streams import CSA_PARTS, HCA_PARTS
from sglang_dsv4.cache.choose_kernels import Kernels
from sglang_dsv4.cache.kernels import LayerMemory
from sglang_dsv4.cache.plan import StepPlan
from sglang_dsv4.cache.regions import Part
from sglang_dsv4.cache.weights import FLOATS, CompressorWeights, NormWeights, check_eps, check_tensor
from sglang_dsv4.errors import StalePlanError

_PARTS = {"window": (Part.WINDOW,), "csa": (Part.WINDOW, Part.MAIN, Part.INDEX), "hca": (Part.WINDOW, Part.MAIN)}


_ORDER = (Part.WINDOW, Part.MAIN, Part.INDEX)
_POOLED = (Part.MAIN, Part.INDEX)


class Steps(Protocol):
    """What a layer asks of its cache about a step."""

    def check(self, plan: StepPlan) -> None:
        """Raise unless the plan is this cache's and can be appended to."""

    def begin(self, plan: StepPlan, layer: "LayerCache") -> None:
        """Before a layer's first write: hold the step's pages, and copy what it shares with others."""


class LayerCache:
    """Rows, index keys and stream state of one layer.

    Attributes:
        memory (LayerMemory): where they lie.
        parts (tuple[Part, ...]): what every step appends.
    """

    def __init__(self, memory: LayerMemory, kernels: Kernels, steps: Steps) -> None:
        self.memory = memory
        self.parts = _PARTS[memory.layer.kind]
        self._kernels = kernels
        self._steps = steps
        self._device = self.pool.device
        self._weights: dict[Part, NormWeights | CompressorWeights] = {}
        self._writers: dict[Part, Callable[[StepTensors, torch.Tensor], None]] = {}
        self._write_both: Callable[[StepTensors, torch.Tensor, torch.Tensor], None] | None = None
        layer, spec = memory.layer, memory.spec
        streams = CSA_PARTS if layer.overlap else HCA_PARTS
        self._dims = {Part.WINDOW: spec.head_dim, Part.MAIN: spec.head_dim, Part.INDEX: spec.index_dim}
        # By part: its name in messages, its key in a plan, and how wide its input is.
        self._inputs = {
            part: (
                f"layer {layer.layer_id} {part}",
                (layer.layer_id, part),
                self._dims[part] * (streams if part in _POOLED else 1),
            )
            for part in self.parts
        }

    @property
    def layer_id(self) -> int:
        """Its number in the model."""
        return self.memory.layer.layer_id

    @property
    def ratio(self) -> int:
        """Tokens per entry; 0 where the layer has none."""
        return self.memory.layer.ratio

    @property
    def pool(self) -> torch.Tensor:
        """The row pool: window rows, then entries."""
        return self.memory.storage.pool

    @property
    def row_format(self) -> RowFormat:
        """How the rows of the pool are packed."""
        return self.memory.spec.rows

    @property
    def rope_table(self) -> torch.Tensor:
        """``[max_seq_len, R]`` fp32, cosines then sines; of the layer's queries as well."""
        return self.memory.rope_table

    def bind(
        self,
        *,
        window: NormWeights | None = None,
        main: CompressorWeights | None = None,
        index: CompressorWeights | None = None,
    ) -> None:
        """Take constants of the layer, which `append` uses from then on; again for a part whose weights were replaced.

        Args:
            window (NormWeights | None): of the K=V projection.
            main (CompressorWeights | None): of the compressor; CSA and HCA layers.
            index (CompressorWeights | None): of the indexer's compressor; CSA layers.

        Raises:
            ValueError, TypeError: the layer has no such part, or a weight does not fit it; nothing was changed.
        """
        given = {Part.WINDOW: window, Part.MAIN: main, Part.INDEX: index}
        checked = {part: self._checked(part, weights) for part, weights in given.items() if weights is not None}
        writers = {part: self._kernels.writer(self.memory, part, weights) for part, weights in checked.items()}
        weights = self._weights | checked
        if Part.MAIN in weights and Part.INDEX in weights:
            self._write_both = self._kernels.writer_of_both(self.memory, weights[Part.MAIN], weights[Part.INDEX])
        self._weights = weights
        self._writers |= writers

    def append(
        self,
        plan: StepPlan,
        *,
        window: torch.Tensor | None = None,
        main: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> None:
        """Write the layer's share of a step; parts may come in one call or in several, each once per step.

        A CSA layer's ``main`` and ``index`` take one launch if they come together.

        Args:
            plan (StepPlan): the step.
            window (torch.Tensor | None): ``[T, 512]``, the K=V projection before its norm and RoPE, fp32 or bf16.
            main (torch.Tensor | None): the compressor's projections, fp32 or bf16, without position bias: ``[T, 4*D]`` (CSA:
                kv_b, kv_a, gate_b, gate_a) or ``[T, 2*D]`` (HCA: kv, gate). The checkpoint's ``[wkv; wgate]`` has this order.
            index (torch.Tensor | None): the same of the indexer's compressor.

        Raises:
            StalePlanError: what the plan rests on has changed, or a part was appended before; nothing was changed.
            ValueError, TypeError: an input does not fit, or its part has no weights yet; nothing was changed.
        """
        parts = [(part, values) for part, values in zip(_ORDER, (window, main, index), strict=True) if values is not None]
        self._steps.check(plan)
        keys = [self._check_input(plan, part, values) for part, values in parts]
        if not parts:
            return
        self._steps.begin(plan, self)
        plan.started.update(keys)  # a part whose write fails stays so: written again, its tokens would be pooled twice
        if main is not None and index is not None and self._write_both is not None:
            self._write_both(plan.step, main, index)
            parts = [(part, values) for part, values in parts if part is Part.WINDOW]
        for part, values in parts:
            self._writers[part](plan.step, values)
        plan.appended.update(keys)

    def select(
        self,
        plan: StepPlan,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        out: torch.Tensor | None = None,
        numbering: StepTensors | None = None,
    ) -> torch.Tensor:
        """Choose the entries that each new token attends to in a CSA layer.

        Args:
            plan (StepPlan): the step, with this layer's index keys appended.
            index_q (torch.Tensor): ``[T, heads, 128]``, index queries before RoPE and rotation, fp32 or bf16.
            index_weights (torch.Tensor): ``[T, heads]``; a positive factor common to all chooses the same.
            out (torch.Tensor | None): ``[T, K]`` int32 to write into, so that a graph's attention finds the rows in its own
                list (`Attention.selected_buffer`); cells behind the entries are left alone then.
            numbering (StepTensors | None): tables of the same requests by which the result is numbered instead of the pool's:
                a long prefill attends over decoded copies of the rows (`Attention.numbering`).

        Returns:
            torch.Tensor: ``out``, or ``[T, K]`` int64 or (Triton) int32 rows of the pool, or of ``numbering``'s, in ascending
            entry order, then -1.

        Raises:
            StalePlanError: the plan is not current, or the index keys are not appended.
            ValueError, TypeError: no CSA layer, or an input does not fit.
        """
        self._steps.check(plan)
        name, memory = f"layer {self.layer_id}", self.memory
        if Part.INDEX not in self.parts:
            raise ValueError(f"{name}: expected a CSA layer, got {memory.layer.kind!r}")
        if plan.num_tokens and (self.layer_id, Part.INDEX) not in plan.appended:
            raise StalePlanError(f"{name}: expected its index keys appended before select, got none")
        heads = index_weights.shape[-1] if isinstance(index_weights, torch.Tensor) and index_weights.ndim else 0
        check_tensor(f"{name} index_weights", index_weights, (plan.num_tokens, heads), FLOATS, self._device)
        check_tensor(f"{name} index_q", index_q, (plan.num_tokens, heads, memory.spec.index_dim), FLOATS, self._device)
        if out is not None and len(out) != plan.num_tokens:
            raise ValueError(f"{name} out: expected {plan.num_tokens} tokens, got {len(out)}")
        return self._kernels.select(memory, plan, index_q, index_weights, out, numbering)

    def _checked(self, part: Part, weights: NormWeights | CompressorWeights) -> NormWeights | CompressorWeights:
        """Weights of a part, detached from any graph of gradients."""
        name, device = f"layer {self.layer_id} {part.value}", self._device
        self._check_part(part)
        kind = NormWeights if part is Part.WINDOW else CompressorWeights
        if not isinstance(weights, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(weights).__name__}")
        check_eps(name, weights.eps)
        dim, layer = self._dims[part], self.memory.layer
        norm = check_tensor(f"{name} norm_weight", weights.norm_weight, (dim,), FLOATS, device).detach()
        if isinstance(weights, NormWeights):
            return NormWeights(norm, weights.eps)
        slots = layer.ratio * (1 + layer.overlap)
        bias = check_tensor(f"{name} slot_bias", weights.slot_bias, (slots, dim), (torch.float32,), device).detach()
        return CompressorWeights(bias, norm, weights.eps)

    def _check_input(self, plan: StepPlan, part: Part, values: object) -> tuple[int, Part]:
        self._check_part(part)
        name, key, width = self._inputs[part]
        check_tensor(name, values, (plan.num_tokens, width), FLOATS, self._device)
        if part not in self._writers:
            raise ValueError(f"{name}: expected weights by `bind` before the first append, got none")
        if key in plan.appended:
            raise StalePlanError(f"{name}: expected once per step, got a second append")
        if key in plan.started:
            raise StalePlanError(f"{name}: an append of it failed half way; expected abandon, then a new plan")
        return key

    def _check_part(self, part: Part) -> None:
        if part not in self._inputs:
            has = ", ".join(found.value for found in self.parts)
            raise ValueError(f"layer {self.layer_id} ({self.memory.layer.kind}): expected parts {has}, got {part.value}")
