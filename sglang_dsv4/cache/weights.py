"""A layer's constants, which `LayerCache.bind` takes once, and the checks of tensors that come from a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class NormWeights:
    """What turns a layer's K=V projection into window rows.

    Attributes:
        norm_weight (torch.Tensor): ``[512]``, fp32 or bf16.
        eps (float): RMSNorm epsilon.
    """

    norm_weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class CompressorWeights:
    """What turns a compressor's projections into entries or index keys of width ``D``.

    Attributes:
        slot_bias (torch.Tensor): ``[2*m, D]`` or ``[m, D]``, fp32, from `dsv4_kernels.streams.slot_bias`.
        norm_weight (torch.Tensor): ``[D]``, fp32 or bf16.
        eps (float): RMSNorm epsilon.
    """

    slot_bias: torch.Tensor
    norm_weight: torch.Tensor
    eps: float


def check_tensor(
    name: str, tensor: object, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> torch.Tensor:
    """The tensor, if it has exactly this shape, one of these dtypes, and lives on this device.

    Raises:
        ValueError: wrong shape or device.
        TypeError: not a tensor, or one of a wrong dtype.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device.type != device.type:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    return tensor


def check_eps(name: str, eps: object) -> None:
    """Raise unless an RMSNorm epsilon is a finite number above 0.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"{name} eps: expected a number, got {type(eps).__name__}")
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"{name} eps: expected a finite number above 0, got {eps}")
