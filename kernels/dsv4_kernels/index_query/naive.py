"""Reference index queries."""

import torch

from dsv4_kernels.hadamard.naive import naive_hadamard
from dsv4_kernels.layout import BF16_INDEX, FP8_INDEX, FP32_INDEX, RowFormat
from dsv4_kernels.norm_rope.naive import naive_rope
from dsv4_kernels.row_codec.naive import naive_quantize_e4m3


def naive_round_query(q: torch.Tensor, key_format: RowFormat) -> torch.Tensor:
    """Round rotated index queries as keys of this format are, one scale a head where keys have one.

    Args:
        q (torch.Tensor): ``[..., 128]``, fp32.
        key_format (RowFormat): of the keys that they meet.

    Returns:
        torch.Tensor: the rounded values, fp32.
    """
    if key_format is FP8_INDEX:
        values, exponent = naive_quantize_e4m3(q)
        return torch.ldexp(values.float(), exponent.unsqueeze(-1))
    return q.bfloat16().float() if key_format is BF16_INDEX else q


def naive_index_query(q: torch.Tensor, cos_sin: torch.Tensor, key_format: RowFormat = FP32_INDEX) -> torch.Tensor:
    """Rotate index queries as the index keys were, and round them alike.

    Equation: q' = ROUND(HADAMARD(ROPE_t(q)))      [INDEX-Q]

    Args:
        q (torch.Tensor): ``[T, heads, 128]``, the projection.
        cos_sin (torch.Tensor): ``[T, 64]``, fp32, the table's rows at the tokens' positions.
        key_format (RowFormat): of the keys, see `naive_round_query`.

    Returns:
        torch.Tensor: ``[T, heads, 128]``, fp32.
    """
    return naive_round_query(naive_hadamard(naive_rope(q, cos_sin)), key_format)
