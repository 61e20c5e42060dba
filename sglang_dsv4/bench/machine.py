"""The GPU that rows were measured on."""

from typing import Any

import torch

from sglang_dsv4.check.compare import machine
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


def environment(bandwidth: float) -> dict[str, Any]:
    """Where rows were measured, and with what: as `compare.machine.environment`, and ``copy_bytes_per_us``.

    Args:
        bandwidth (float): bytes per microsecond of a copy on the device.
    """
    return {**machine.environment("cuda"), "copy_bytes_per_us": bandwidth}
