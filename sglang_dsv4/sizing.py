"""How many tokens fit into how much memory."""

from dataclasses import dataclass
from typing import Any

from sglang_dsv4.cache.storage import Capacity
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.spec import CacheSpec

GIB = 1 << 30
_FP32_BYTES = 4
# What the released configurations say about the cache.
_COMMON: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "sliding_window": 128,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
RELEASED: dict[str, dict[str, Any]] = {
    "flash": {
        **_COMMON,
        "num_hidden_layers": 43,
        "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
        "index_topk": 512,
    },
    "pro": {
        **_COMMON,
        "num_hidden_layers": 61,
        "compress_ratios": [128, 128, *([4, 128] * 29), 4, 0],
        "index_topk": 1024,
    },
}
CONTEXT_TOKENS = 1 << 20


def released_spec(name: str, **options: Any) -> CacheSpec:
    """The cache of a released model.

    Args:
        name (str): ``flash`` or ``pro``.
        **options (Any): as for `CacheSpec.from_hf`.

    Raises:
        UnsupportedError: another name.
    """
    if name not in RELEASED:
        raise UnsupportedError(f"model: expected one of {sorted(RELEASED)}, got {name!r}")
    return CacheSpec.from_hf(RELEASED[name], **options)


@dataclass(frozen=True)
class ServerSize:
    """What decides the size of a server's cache, beside its spec.

    Attributes:
        tokens (int): SGLang's ``--max-total-tokens``, whole pages.
        requests (int): places for stream state.
        window_share (float): SGLang's ``--swa-full-tokens-ratio``.
        context_tokens (int): longest sequence that the model allows.
    """

    tokens: int
    requests: int
    window_share: float
    context_tokens: int = CONTEXT_TOKENS

    def capacity(self, page_tokens: int) -> Capacity:
        """Pages and slots of the cache that SGLang has the plug-in make: one page of each kind takes SGLang's padding."""
        return Capacity(
            history_pages=self.tokens // page_tokens + 1,
            window_pages=int(self.tokens * self.window_share) // page_tokens + 1,
            state_slots=self.requests + 1,
            max_seq_len=min(self.context_tokens, self.tokens) + page_tokens,
            reserved_pages=1,
        )


def bytes_by_pool(spec: CacheSpec, capacity: Capacity) -> dict[str, int]:
    """Bytes of a cache's tensors, by pool, the padding of groups included; nothing is allocated."""
    window_rows = capacity.window_pages * spec.page_tokens
    totals = {"row_pools": 0, "index_keys": 0, "stream_state": 0, "boundary_state": 0}
    for layer in spec.layers:
        entries = capacity.history_pages * (spec.page_tokens // layer.ratio) if layer.ratio else 0
        totals["row_pools"] += spec.rows.pool_bytes(window_rows + entries)
        totals["index_keys"] += spec.index_keys.pool_bytes(entries) if layer.indexed else 0
        totals["stream_state"] += capacity.state_slots * spec.stream_bytes(layer)
        totals["boundary_state"] += capacity.window_pages * spec.boundary_bytes(layer)
    ropes = {layer.rope for layer in spec.layers}
    totals["rope_tables"] = len(ropes) * capacity.max_seq_len * spec.rope_dim * _FP32_BYTES
    return totals


def size_of(spec: CacheSpec, size: ServerSize) -> int:
    """Bytes of a server's cache."""
    return sum(bytes_by_pool(spec, size.capacity(spec.page_tokens)).values())


def most_tokens(
    spec: CacheSpec,
    memory_bytes: int,
    requests: int,
    window_share: float,
    context_tokens: int = CONTEXT_TOKENS,
) -> int:
    """The most tokens, in whole pages, whose cache fits into ``memory_bytes``; 0 where not even a page does."""

    def fits(pages: int) -> bool:
        size = ServerSize(pages * spec.page_tokens, requests, window_share, context_tokens)
        return size_of(spec, size) <= memory_bytes

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * spec.page_tokens
