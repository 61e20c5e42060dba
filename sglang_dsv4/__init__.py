"""The KV cache of DeepSeek-V4 as one object, exact at any cut point."""

from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.spec import CacheSpec

__version__ = "0.1.0"

__all__ = ["CacheSpec", "CompressedKVCache", "__version__"]
