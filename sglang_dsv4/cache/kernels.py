"""The kernels of a cache, as one interface: PyTorch anywhere, Triton on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from dsv4_kernels.compressor import CompressorParams
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.step import StepTensors
from sglang_dsv4.cache.plan import StepPlan
from sglang_dsv4.cache.regions import Kind, Part
from sglang_dsv4.cache.storage import LayerStorage
from sglang_dsv4.cache.weights import CompressorWeights, NormWeights
from sglang_dsv4.spec import CacheSpec, LayerSpec

Weights = NormWeights | CompressorWeights


@dataclass(frozen=True)
class LayerMemory:
    """What kernels of one layer read and write.

    Attributes:
        spec (CacheSpec): the cache's.
        layer (LayerSpec): the layer's.
        storage (LayerStorage): its tensors.
        rope_table (torch.Tensor): ``[max_seq_len, R]`` fp32.
    """

    spec: CacheSpec
    layer: LayerSpec
    storage: LayerStorage
    rope_table: torch.Tensor

    def tensor(self, kind: Kind, part: Part) -> torch.Tensor:
        """The memory of a kind of row that the layer has."""
        found = self.storage.tensor(kind, part)
        assert found is not None, f"layer {self.layer.layer_id} has no {kind.value} of {part.value}"
        return found

    def target(self, part: Part) -> tuple[torch.Tensor, RowFormat]:
        """Where a compressor's output goes."""
        if part is Part.INDEX:
            return self.tensor(Kind.INDEX_KEY, part), self.spec.index_keys
        return self.storage.pool, self.spec.rows

    def params(self, part: Part, weights: Weights) -> CompressorParams:
        """A compressor's constants as kernels take them; index keys are Hadamard-rotated."""
        assert isinstance(weights, CompressorWeights), "checked by `LayerCache.bind`"
        return CompressorParams(weights.slot_bias, weights.norm_weight, weights.eps, self.rope_table, rotate=part is Part.INDEX)


class Kernels(Protocol):
    """What fills a cache and chooses its entries.

    The three parts of a layer may be written on three streams: the scratch of each is used by no other.
    """

    name: str

    @property
    def index_scores(self) -> str:
        """Whose kernels score index keys."""

    @property
    def nbytes(self) -> int:
        """Bytes of scratch."""

    def writer(self, memory: LayerMemory, part: Part, weights: Weights) -> Callable[[StepTensors, torch.Tensor], None]:
        """What writes one part of a step, with everything bound that does not change from step to step."""

    def writer_of_both(
        self, memory: LayerMemory, main: Weights, index: Weights
    ) -> Callable[[StepTensors, torch.Tensor, torch.Tensor], None] | None:
        """What writes a CSA layer's main and indexer parts in one launch; None where that is no gain."""

    def select(
        self,
        memory: LayerMemory,
        plan: StepPlan,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        out: torch.Tensor | None,
        numbering: StepTensors | None,
    ) -> torch.Tensor:
        """`LayerCache.select`, its arguments checked."""
