"""The compressed KV cache: memory, per-request state, and the rules that keep them right."""

from sglang_dsv4.cache.cache import CompressedKVCache
from sglang_dsv4.cache.inputs import CompressorInput, WindowInput
from sglang_dsv4.cache.pages.allocator import ExternalPages, PageAllocator, PageTables
from sglang_dsv4.cache.pages.request import Request, Snapshot
from sglang_dsv4.cache.persist.prune import prune_saved
from sglang_dsv4.cache.plan import StepPlan
from sglang_dsv4.cache.storage import Capacity
from sglang_dsv4.cache.view import LayerView

__all__ = [
    "Capacity",
    "CompressedKVCache",
    "CompressorInput",
    "ExternalPages",
    "LayerView",
    "PageAllocator",
    "PageTables",
    "Request",
    "Snapshot",
    "StepPlan",
    "WindowInput",
    "prune_saved",
]
