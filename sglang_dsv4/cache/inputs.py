"""What a model passes to `CompressedKVCache.append`."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WindowInput:
    """A layer's K=V projection.

    Attributes:
        kv (torch.Tensor): ``[T, 512]``, before its norm and RoPE.
        norm_weight (torch.Tensor): ``[512]``.
        eps (float): RMSNorm epsilon.
    """

    kv: torch.Tensor
    norm_weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class CompressorInput:
    """A compressor's projections.

    Attributes:
        kv_score (torch.Tensor): ``[T, 4*D]`` (CSA: kv_b, kv_a, gate_b, gate_a) or ``[T, 2*D]`` (HCA: kv, gate), fp32 or
            bf16, without position bias. The checkpoint's ``[wkv; wgate]`` gives exactly this order.
        slot_bias (torch.Tensor): ``[2*m, D]`` or ``[m, D]``, fp32, from `dsv4_kernels.streams.slot_bias`.
        norm_weight (torch.Tensor): ``[D]``.
        eps (float): RMSNorm epsilon.
    """

    kv_score: torch.Tensor
    slot_bias: torch.Tensor
    norm_weight: torch.Tensor
    eps: float
