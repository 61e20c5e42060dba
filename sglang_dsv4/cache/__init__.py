"""The compressed KV cache: memory, per-request state, and the rules that keep them right."""

from sglang_dsv4.cache.cache import CompressedKVCache
from sglang_dsv4.cache.external import ExternalKVCache
from sglang_dsv4.cache.layer import LayerCache
from sglang_dsv4.cache.pages.request import Request, Snapshot
from sglang_dsv4.cache.persist.prune import prune_saved
from sglang_dsv4.cache.plan import StepPlan
from sglang_dsv4.cache.storage import Capacity
from sglang_dsv4.cache.weights import CompressorWeights, NormWeights

__all__ = [
    "Capacity",
    "CompressedKVCache",
    "CompressorWeights",
    "ExternalKVCache",
    "LayerCache",
    "NormWeights",
    "Request",
    "Snapshot",
    "StepPlan",
    "prune_saved",
]
