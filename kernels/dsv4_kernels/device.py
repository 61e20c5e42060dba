"""What a launcher must know of the machine it launches on."""

from functools import cache

import torch
import triton
import triton.language as tl
from triton import knobs

# Added to every launch. Without it the compiler may fuse a product into a sum in one specialisation of a kernel and not
# in another, and the same entry would get other bytes in decode than in prefill.
EXACT = {"enable_fp_fusion": False}


def is_interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return bool(knobs.runtime.interpret)


@cache
def _has_e4m3(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) >= (8, 9)


def hardware_casts(device: torch.device) -> bool:
    """Whether the device rounds fp32 to e4m3 and bf16 itself; where not, kernels do it by integer arithmetic.

    SM80 and SM86 have no e4m3 conversion, and Triton's CPU interpreter does not round as a GPU does.
    """
    if device.type != "cuda" or is_interpreting():
        return False
    return _has_e4m3(torch.cuda.current_device() if device.index is None else device.index)


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the rows of ``tensor`` are contiguous; they may be apart.

    Raises:
        ValueError: the last dimension has a stride other than 1.
    """
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected stride 1 in the last dimension, got {tensor.stride(-1)}")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Raise unless ``tensor`` is contiguous.

    Raises:
        ValueError: it is not.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


@triton.jit
def zero_like(x):
    """0 as a tensor of ``x``'s type; the compiler folds it.

    The interpreter takes a literal, a loop's number, and what is added to either for plain Python numbers, which lack `to`
    and cannot be given to a function of tensors. ``zero_like(x) + i`` is a tensor to both.
    """
    return tl.zeros_like(x)
