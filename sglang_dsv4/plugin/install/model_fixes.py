"""Two properties of SGLang's model that must hold for our cache to be right, and are made so after loading."""

from typing import Any

import torch

from dsv4_kernels.norm_rope import RopeSpec, rope_table
from sglang_dsv4.cache import ExternalKVCache
from sglang_dsv4.errors import UnsupportedError

PROBED_POSITIONS = 256
# An angle is a position below 256 times a frequency of two roundings, rounded itself: 3 * 2^-24 relative, and 4 for safety.
ROPE_TOLERANCE = PROBED_POSITIONS * 4 * 2.0**-24


def _complex_table(rope: RopeSpec, num_positions: int, device: torch.device) -> torch.Tensor:
    cos, sin = rope_table(rope, num_positions, device).chunk(2, dim=1)
    return torch.complex(cos.contiguous(), sin.contiguous())


def unscale_window_rope(model: Any, cache: ExternalKVCache) -> list[int]:
    """Give window-only layers their plain RoPE.

    SGLang 0.5.17 applies YaRN to every layer; the released model applies it to compressing layers only. The cache holds
    unscaled window rows there, so the queries must be unscaled as well.

    Args:
        model (Any): SGLang's DeepseekV4ForCausalLM.
        cache (ExternalKVCache): knows each layer's RoPE.

    Returns:
        list[int]: layers whose table was replaced; none where SGLang's was right.
    """
    replaced = []
    tables: dict[RopeSpec, torch.Tensor] = {}
    for layer in cache.spec.layers:
        attention = model.model.layers[layer.layer_id].self_attn
        if layer.ratio == 0:
            have = attention.freqs_cis
            expected = tables.setdefault(layer.rope, _complex_table(layer.rope, len(have), have.device))
            if not torch.allclose(have, expected):
                attention.freqs_cis = expected
                replaced.append(layer.layer_id)
    return replaced


def check_rope(model: Any, cache: ExternalKVCache) -> None:
    """Compare the rotation of queries with that of the cache's rows.

    Raises:
        UnsupportedError: a layer's tables differ by more than rounding, `ROPE_TOLERANCE`.
    """
    for layer in cache.spec.layers:
        table = cache.layers[layer.layer_id].rope_table[:PROBED_POSITIONS]
        cos, sin = table.chunk(2, dim=1)
        freqs = model.model.layers[layer.layer_id].self_attn.freqs_cis[: len(table)]
        error = max((freqs.real - cos).abs().max().item(), (freqs.imag - sin).abs().max().item())
        if error > ROPE_TOLERANCE:
            raise UnsupportedError(
                f"layer {layer.layer_id}: expected SGLang's RoPE table to equal the cache's within {ROPE_TOLERANCE:.1e}, "
                f"got a difference of {error:.1e}"
            )
