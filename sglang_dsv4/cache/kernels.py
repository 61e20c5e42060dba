"""What kernels of one layer work on, whether in PyTorch or in Triton."""

from dataclasses import dataclass

import torch

from dsv4_kernels.compressor import CompressorParams
from dsv4_kernels.layout import RowFormat
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
