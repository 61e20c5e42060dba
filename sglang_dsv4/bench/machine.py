"""The GPU that rows were measured on."""

import platform

import torch
import triton

from sglang_dsv4.errors import UnsupportedError


def need_cuda(what: str) -> None:
    """Refuse to measure where there is no GPU.

    Args:
        what (str): the benchmark.

    Raises:
        UnsupportedError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(f"{what}: expected a CUDA device, found none; nothing was run")


def environment(bandwidth: float) -> dict:
    """Where rows were measured, and with what.

    Args:
        bandwidth (float): bytes per microsecond of a copy on the device.
    """
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "copy_bytes_per_us": bandwidth,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
