"""The KV cache of DeepSeek-V4 as one object, exact at any cut point."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_dsv4.cache import CompressedKVCache
    from sglang_dsv4.runtime.runtime import Runtime
    from sglang_dsv4.spec import CacheSpec

__version__ = "0.1.0"

__all__ = ["CacheSpec", "CompressedKVCache", "Runtime", "__version__"]

# Imported on first use: the plug-in's entry must load without torch or the kernels, so that it can say what is missing.
_HOME = {"CacheSpec": "sglang_dsv4.spec", "CompressedKVCache": "sglang_dsv4.cache", "Runtime": "sglang_dsv4.runtime.runtime"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
