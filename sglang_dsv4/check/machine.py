"""Where something was measured, with which versions."""

import importlib.metadata
import platform
from typing import Any

import torch

from sglang_dsv4 import __version__

_PACKAGES = ("sglang", "torch", "triton", "flashinfer-python", "sgl-flash-mla", "sglang-kernel", "tilelang")


def environment(device: str) -> dict[str, Any]:
    """The device and all versions; None for what is not installed."""
    on_gpu = device == "cuda"
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "cuda": torch.version.cuda,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "sglang-dsv4": __version__,
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
