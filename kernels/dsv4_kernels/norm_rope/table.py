"""Rotary frequencies of DeepSeek-V4, and their table."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RopeSpec:
    """One rotary embedding.

    Attributes:
        theta (float): base of the frequencies.
        dim (int): rotated channels.
        factor (float): YaRN's interpolation factor; 1.0 means plain RoPE.
        original_positions (int): positions the model was trained on before extension.
        beta_fast (float): rotations above which a frequency is kept.
        beta_slow (float): rotations below which a frequency is divided by ``factor``.
    """

    theta: float
    dim: int
    factor: float = 1.0
    original_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def _correction_dim(self, rotations: float) -> float:
        return self.dim * math.log(self.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

    def inv_freq(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Frequencies of the ``dim/2`` pairs, fp32.

        Equation:
            f_i = theta^(-2i/dim); with YaRN, f_i * (1 - r_i) + f_i / factor * r_i, r a ramp from 0 to 1      [YARN]
            There is no attention factor: DeepSeek-V4 does not scale the magnitude.
        """
        pairs = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device)
        freq = 1.0 / (self.theta ** (pairs / self.dim))
        if self.factor == 1.0:
            return freq
        low = max(math.floor(self._correction_dim(self.beta_fast)), 0)
        high = min(math.ceil(self._correction_dim(self.beta_slow)), self.dim - 1)
        span = max(high - low, 0.001)  # equal corrections would divide by zero
        ramp = ((torch.arange(self.dim // 2, dtype=torch.float32, device=device) - low) / span).clamp(0, 1)
        keep = 1 - ramp
        return freq / self.factor * (1 - keep) + freq * keep


def rope_table(spec: RopeSpec, num_positions: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Cosines and sines of positions ``0 .. num_positions-1``.

    Args:
        spec (RopeSpec): the embedding.
        num_positions (int): rows of the table.
        device (torch.device | str): where the table lives.

    Returns:
        torch.Tensor: ``[num_positions, dim]``, fp32: ``dim/2`` cosines, then ``dim/2`` sines.
    """
    positions = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, spec.inv_freq(device))  # [P, dim/2]
    return torch.cat([angles.cos(), angles.sin()], dim=1)
