"""Attention of one query in fp64, and how far a bf16 kernel may be off."""

from dataclasses import dataclass

import torch

_BF16_HALF_STEP = 2.0**-8  # of the value, at most


@dataclass(frozen=True)
class Exact:
    """One query's attention in fp64.

    Attributes:
        out (torch.Tensor): ``[H, 512]``, sink and inverse rotation included.
        allowed (torch.Tensor): ``[H, 512]``, largest error of a kernel's value that rounding explains.
        dropped_least (float): how far the result moves, in units of ``allowed``, when the key that matters least is left out;
            infinite where that was not asked for.
    """

    out: torch.Tensor
    allowed: torch.Tensor
    dropped_least: float


def exact(
    q: torch.Tensor,
    rows: torch.Tensor,
    sink: torch.Tensor,
    sm_scale: float,
    angles: torch.Tensor | None = None,
    *,
    drop: bool = False,
) -> Exact:
    """Attention of one query, as [ATTN-27] of `naive_sparse_attention`, then the inverse of [ROPE].

    A kernel rounds to bf16: each weight (errors independent, at most 2^-8 of the weight, so 2^-8 * sqrt(sum w^2 v^2) / sqrt(3)
    as a random walk; six of them, and as much again where pieces are rounded, give 2^-5.2 of the root), the attention before
    the sink, and the result: 2^-8 of the value each. Logits are fp32 sums of exact products. A rotated pair shares its errors.

    Args:
        q (torch.Tensor): ``[H, 512]``.
        rows (torch.Tensor): ``[N, 512]``, the listed rows as the pool holds them.
        sink (torch.Tensor): ``[H]``.
        sm_scale (float): softmax scale.
        angles (torch.Tensor | None): ``[64]``, cosines and sines of the query's position; None keeps the rotation.
        drop (bool): find ``dropped_least``.
    """
    q, rows, sink = q.double(), rows.double(), sink.double()
    logits = q @ rows.T * sm_scale  # [H, N]
    weights = torch.cat([logits, sink.unsqueeze(1)], 1).softmax(1)[:, :-1]
    out = weights @ rows
    root = (weights.square() @ rows.square()).sqrt()
    allowed = 2 * _BF16_HALF_STEP * out.abs() + 2.0**-5.2 * root + 2.0**-40
    if angles is not None:
        pairs = allowed[..., -64:].unflatten(-1, (-1, 2)).sum(-1, keepdim=True).expand(-1, -1, 2)
        allowed = torch.cat([allowed[..., :-64], pairs.flatten(-2)], -1)
    least = float("inf")
    if drop:
        for key in range(len(rows)):
            weight = weights[:, key : key + 1]
            moved = weight * (out - rows[key]) / (1 - weight)  # without the key: (out - w v) / (1 - w)
            least = min(least, float((_unrotate(moved, angles).abs() / allowed).max()))
    return Exact(_unrotate(out, angles), allowed, least)


def worst(found: torch.Tensor, expected: Exact) -> float:
    """Largest error in units of what is allowed; infinite where a value is not finite."""
    if not torch.isfinite(found).all():
        return float("inf")
    return float(((found.double() - expected.out).abs() / expected.allowed).max())


def _unrotate(x: torch.Tensor, angles: torch.Tensor | None) -> torch.Tensor:
    """Inverse rotation of ``[..., 512]`` at one position."""
    if angles is None:
        return x
    cos, sin = angles.double().chunk(2)
    even, odd = x[..., -64::2], x[..., -63::2]
    rotated = torch.stack([even * cos + odd * sin, odd * cos - even * sin], -1).flatten(-2)
    return torch.cat([x[..., :-64], rotated], -1)
