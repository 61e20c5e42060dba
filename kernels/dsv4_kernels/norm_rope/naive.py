"""Reference RMSNorm and RoPE, in one fixed order of additions."""

import torch


def _tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum the last dimension, a power of two, by halving.

    Elementwise additions only: the order cannot depend on how many rows are summed together.
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def naive_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Normalise rows by their root mean square.

    Equation:
        y = x / sqrt(mean(x^2) + eps) * weight      [NORM]

    Args:
        x (torch.Tensor): ``[..., D]``, ``D`` a power of two.
        weight (torch.Tensor | None): ``[D]``; None for the weightless norm of query heads.
        eps (float): > 0.

    Returns:
        torch.Tensor: ``[..., D]``, fp32.
    """
    x = x.float()
    mean_square = _tree_sum(x * x) / x.shape[-1]
    y = x * torch.rsqrt(mean_square + eps)
    return y if weight is None else y * weight.float()


def naive_rope(x: torch.Tensor, cos_sin: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """Rotate the last channels of ``x``, in interleaved pairs.

    Equation:
        (x[2i], x[2i+1]) <- (x[2i] cos - x[2i+1] sin, x[2i] sin + x[2i+1] cos)      [ROPE]

    Args:
        x (torch.Tensor): ``[N, ..., D]``.
        cos_sin (torch.Tensor): ``[N, R]``, fp32: ``R/2`` cosines, then ``R/2`` sines, of each row's position. The last
            ``R`` channels are rotated.
        inverse (bool): rotate by the negative angle.

    Returns:
        torch.Tensor: like ``x``, fp32.
    """
    rope_dim = cos_sin.shape[-1]
    cos, sin = cos_sin.split(rope_dim // 2, dim=-1)
    shape = (len(x),) + (1,) * (x.dim() - 2) + (rope_dim // 2,)
    cos, sin = cos.view(shape), sin.view(shape)
    if inverse:
        sin = -sin
    x = x.float()
    even, odd = x[..., -rope_dim::2], x[..., -rope_dim + 1 :: 2]
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return torch.cat([x[..., :-rope_dim], rotated], dim=-1)
