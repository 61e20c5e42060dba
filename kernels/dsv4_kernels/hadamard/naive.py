"""Reference Hadamard rotation."""

import torch


def naive_hadamard(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension by the orthonormal Hadamard matrix.

    Equation:
        y = x H_D / sqrt(D), H in Sylvester order: H[i, j] = (-1)^popcount(i & j)      [HADAMARD]

    Args:
        x (torch.Tensor): ``[..., D]``, ``D`` a power of two.

    Returns:
        torch.Tensor: ``[..., D]``, fp32.
    """
    shape, dim = x.shape, x.shape[-1]
    y = x.float()
    half = 1
    while half < dim:
        y = y.reshape(-1, dim // (2 * half), 2, half)
        first, second = y[:, :, 0], y[:, :, 1]
        y = torch.stack([first + second, first - second], dim=2)
        half *= 2
    return y.reshape(shape) * dim**-0.5
