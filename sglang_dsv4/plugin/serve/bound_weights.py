"""SGLang's weights of a layer, bound to the cache's layer."""

from typing import Any

import torch

from sglang_dsv4.cache import CompressorWeights, LayerCache, NormWeights


class BoundWeights:
    """Binds a part's weights when SGLang first passes them, and again when it passes others.

    A new value in the same memory, which is how SGLang updates weights, needs no binding; a weight in other memory is noticed
    by its address. The bound tensor keeps its memory, so no other weight can get the address of an old one.

    Args:
        layers (tuple[LayerCache, ...]): of the cache.
    """

    def __init__(self, layers: tuple[LayerCache, ...]) -> None:
        self._layers = layers
        self._addresses: dict[tuple[int, str], tuple[int, ...]] = {}

    def window(self, layer_id: int, weight: torch.Tensor, eps: float) -> LayerCache:
        """The layer, with the norm of its K=V projection bound."""
        layer, key, found = self._layers[layer_id], (layer_id, "window"), (weight.data_ptr(),)
        if self._addresses.get(key) != found:
            layer.bind(window=NormWeights(weight, eps))
            self._addresses[key] = found
        return layer

    def compressor(self, layer_id: int, part: str, compressor: Any) -> LayerCache:
        """The layer, with one of SGLang's Compressors bound as its part ``main`` or ``index``."""
        layer, key, bias, norm = self._layers[layer_id], (layer_id, part), compressor.ape, compressor.norm
        found = (bias.data_ptr(), norm.weight.data_ptr())
        if self._addresses.get(key) != found:
            # SGLang re-lays ``ape`` at load as [slots, D]: first the previous block's rows, then the own block's.
            weights = CompressorWeights(bias.view(-1, compressor.head_dim), norm.weight, norm.variance_epsilon)
            layer.bind(**{part: weights})
            self._addresses[key] = found
        return layer
