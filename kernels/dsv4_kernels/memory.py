"""Allocation of memory that its owner promises to write before reading."""

import torch

_poison = False


def set_poison(enabled: bool) -> None:
    """Fill every later allocation with values that cannot go unnoticed, to prove that nothing unwritten is read.

    Floats are NaN and integers the largest of their type, so an index is out of range and the bytes of a packed row are
    0xFF: NaN as e4m3, as bf16 and as UE8M0.
    """
    global _poison
    _poison = enabled


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Allocate uninitialised memory; the only place of this package and its callers that does."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if _poison:
        tensor.fill_(_poison_value(dtype))
    return tensor


def _poison_value(dtype: torch.dtype) -> float:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max
