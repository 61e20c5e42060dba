"""Where servers ran, and with what."""

import importlib.metadata
import platform
from typing import Any

import torch

from sglang_dsv4 import __version__

_PACKAGES = (
    "sglang",
    "torch",
    "triton",
    "flashinfer-python",
    "sgl-flash-mla",
    "sglang-kernel",
    "tilelang",
)


def environment(device: str) -> dict[str, Any]:
    """Where it was measured, and with what; a package that is not there is None."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpu = None
    if device == "cuda":
        gpu = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {
        "device": device,
        "gpu": gpu,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "sglang-dsv4": __version__,
        "versions": versions,
    }
