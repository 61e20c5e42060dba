"""How far a fused score may lie from the exact one."""

import torch

# Channels that one instruction of a tensor core adds to a sum of e4m3 products.
_E4M3_STEP = 32


def score_bound(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, *, e4m3: bool) -> torch.Tensor:
    """Largest error of one token's scores that rounding explains.

    Every sum of 128 products and of the heads loses at most 2^-22 of its terms' magnitudes a step: a tensor core may cut off
    where IEEE rounds, and keeps two bits more than fp32. Where it multiplies e4m3, an instruction shifts 32 products and the sum
    so far to the largest exponent among them and keeps 13 bits behind its first, so that each of the 33 loses less than 2^-13
    of the largest.

    Args:
        q (torch.Tensor): ``[heads, 128]``, rounded queries.
        weights (torch.Tensor): ``[heads]``.
        keys (torch.Tensor): ``[S, 128]``.
        e4m3 (bool): queries and keys are e4m3 numbers times powers of two, and may be multiplied as such.

    Returns:
        torch.Tensor: ``[S]``, fp64.
    """
    q, weights, keys = q.double(), weights.double().abs(), keys.double()
    heads, dim = q.shape
    bound = (dim + heads) * 2.0**-22 * (weights @ (q.abs() @ keys.abs().T))
    if not e4m3:
        return bound
    before = torch.zeros(heads, len(keys), dtype=torch.float64, device=q.device)
    for first in range(0, dim, _E4M3_STEP):
        part = slice(first, first + _E4M3_STEP)
        products = q[:, None, part] * keys[None, :, part]  # [heads, S, 32]
        largest = torch.maximum(before.abs(), products.abs().amax(2))
        bound = bound + (_E4M3_STEP + 1) * 2.0**-13 * (weights @ largest)
        before = before + products.sum(2)
    return bound
