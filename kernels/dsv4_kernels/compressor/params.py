"""Weights and constants of one compressor."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CompressorParams:
    """Weights and constants of one compressor.

    Attributes:
        slot_bias (torch.Tensor): ``[2*m, D]`` (CSA) or ``[m, D]`` (HCA), fp32, from `dsv4_kernels.streams.slot_bias`.
        norm_weight (torch.Tensor): ``[D]``.
        eps (float): RMSNorm epsilon.
        cos_sin (torch.Tensor): ``[P, R]``, fp32, from `dsv4_kernels.norm_rope.rope_table`.
        rotate (bool): Hadamard-rotate the entries (index keys).
    """

    slot_bias: torch.Tensor
    norm_weight: torch.Tensor
    eps: float
    cos_sin: torch.Tensor
    rotate: bool = False
