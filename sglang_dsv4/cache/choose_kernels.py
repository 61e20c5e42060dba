"""Which kernels a cache gets."""

from typing import TYPE_CHECKING, TypeAlias

import torch

from dsv4_kernels.device import is_interpreting
from sglang_dsv4.cache.storage import Capacity
from sglang_dsv4.cache.torch_kernels import TorchKernels
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.spec import CacheSpec

if TYPE_CHECKING:
    from sglang_dsv4.cache.triton_kernels import TritonKernels

# The same methods, PyTorch anywhere and Triton on a GPU. The three parts of a layer may be written on three streams: the scratch
# of each is used by no other.
Kernels: TypeAlias = "TorchKernels | TritonKernels"
KERNELS = ("auto", "torch", "triton")


def make_kernels(
    name: str, spec: CacheSpec, capacity: Capacity, device: torch.device, index_heads: int | None = None
) -> Kernels:
    """The kernels of a cache.

    Args:
        name (str): of `KERNELS`; ``"auto"`` takes Triton on a CUDA device and PyTorch elsewhere.
        spec (CacheSpec): the cache's.
        capacity (Capacity): bounds the scratch.
        device (torch.device): where the cache lives.
        index_heads (int | None): of the indexer; its scratch is allocated at once where they are known.

    Raises:
        ValueError: an unknown name.
        UnsupportedError: Triton was asked for where it cannot run.
    """
    if name not in KERNELS:
        raise ValueError(f"kernels: expected one of {KERNELS}, got {name!r}")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return TorchKernels()
    # Triton is imported where it runs: it is no requirement elsewhere.
    from sglang_dsv4.cache.triton_kernels import TritonKernels

    if device.type != "cuda" and not is_interpreting():
        raise UnsupportedError(f"kernels triton: expected a CUDA device, got {device}")
    return TritonKernels(spec, capacity, device, index_heads)
