"""What storing a row costs: rounding to a row format and back, without storing anything.

Written from the format's definition and not from the codec it is used to check.
"""

from collections.abc import Callable

import torch

NOPE_DIM = 448
TILE = 64
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4

Rounding = Callable[[torch.Tensor], torch.Tensor]


def keep(rows: torch.Tensor) -> torch.Tensor:
    """Rows of fp32 are stored as they are."""
    return rows


def round_to_bf16(rows: torch.Tensor) -> torch.Tensor:
    """Round ``[..., 512]`` rows to bf16; dtype kept."""
    return rows.to(torch.bfloat16).to(rows.dtype)


def round_to_fp8_584(rows: torch.Tensor) -> torch.Tensor:
    """Round ``[..., 512]`` rows as the 584-byte format does; dtype kept.

    Each 64 of the first 448 values share the smallest power-of-two scale under which their largest fits into e4m3; the
    last 64 values, which carry the rotation, are bf16.
    """
    tiles = rows[..., :NOPE_DIM].float().unflatten(-1, (-1, TILE))  # [..., 7, 64]
    largest = tiles.abs().amax(dim=-1, keepdim=True).clamp_min(AMAX_FLOOR)
    scale = torch.exp2(torch.ceil(torch.log2(largest / E4M3_MAX)))
    nope = (tiles / scale).to(torch.float8_e4m3fn).float() * scale
    return torch.cat([nope.flatten(-2).to(rows.dtype), round_to_bf16(rows[..., NOPE_DIM:])], dim=-1)


ROUNDINGS: dict[str, Rounding] = {"fp32": keep, "bf16": round_to_bf16, "fp8_584": round_to_fp8_584}
