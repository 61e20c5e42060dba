"""Reference of what is left to do once attention without a sink is known."""

import math

import torch

from dsv4_kernels.norm_rope import naive_rope
from dsv4_kernels.sink_rope.splits import Splits


def _merged(out: torch.Tensor, lse: torch.Tensor, splits: Splits) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = out.clone(), lse.clone()
    for token, count in enumerate(splits.num_pieces.tolist()):
        if count > 1:
            lane = int(splits.first_lane[token])
            slots = [2 * lane + 1] + [2 * (lane + piece) for piece in range(1, count)]
            parts = splits.partial_lse[slots] * math.log(2)  # [pieces, H]
            lse[token] = torch.logsumexp(parts, dim=0)
            weights = torch.exp(parts - lse[token].masked_fill(lse[token].isneginf(), 0.0))
            out[token] = (weights.unsqueeze(-1) * splits.partial[slots].float()).sum(0)
    return out, lse


def naive_sink_rope(
    out: torch.Tensor,
    lse: torch.Tensor,
    sink: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    splits: Splits | None = None,
) -> None:
    """Merge pieces, give the sink its weight, and undo the rotation, in place.

    Equation:
        o <- o * exp(lse) / (exp(lse) + exp(sink)) = o * sigmoid(lse - sink);  o <- ROPE_-t(o)      [ATTN-27], [ROPE]

    Args:
        out (torch.Tensor): ``[T, H, D]``, attention without a sink. Written.
        lse (torch.Tensor): ``[T, H]`` fp32, its natural log-sum-exp; -inf for a query without keys, which gets zeros.
        sink (torch.Tensor | None): ``[H]`` sink logits, +-inf allowed; None for no sink.
        positions (torch.Tensor): ``[T]`` int64; -1 is padding, and is not rotated.
        cos_sin (torch.Tensor | None): ``[P, R]``, fp32; the last ``R`` channels are rotated. None keeps the rotation.
        splits (Splits | None): pieces of the queries that have several; ``out`` and ``lse`` are not read there.
    """
    found, lse = out.float(), lse.float()
    if splits is not None:
        found, lse = _merged(found, lse, splits)
    if sink is not None:
        weight = torch.sigmoid(lse - sink.float()).masked_fill(lse.isneginf(), 0.0)  # [T, H]
        found = (found * weight.unsqueeze(-1)).masked_fill((weight == 0).unsqueeze(-1), 0.0)
    if cos_sin is not None:
        rotated = naive_rope(found, cos_sin[positions.clamp_min(0)], inverse=True)
        found = torch.where((positions < 0)[:, None, None], found, rotated)
    out.copy_(found)
