"""How many tokens fit into how much memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sglang_dsv4.cache.storage import CacheStorage, Capacity
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.spec import CacheSpec

GIB = 1 << 30
_SPAN = 1 << 14  # pages over which the bytes of one are averaged
NOWHERE = torch.device("meta")  # tensors with a size and no memory
# What the released configurations say about the cache.
_COMMON: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "sliding_window": 128,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1},
}
RELEASED: dict[str, dict[str, Any]] = {
    "flash": {**_COMMON, "num_hidden_layers": 43, "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0], "index_topk": 512},
    "pro": {**_COMMON, "num_hidden_layers": 61, "compress_ratios": [128, 128, *([4, 128] * 29), 4, 0], "index_topk": 1024},
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
        """Pages and slots of the cache that SGLang has the plug-in make."""
        return serving_capacity(
            page_tokens, self.tokens, int(self.tokens * self.window_share), self.requests + 1, self.context_tokens
        )


def serving_capacity(
    page_tokens: int, history_tokens: int, window_tokens: int, state_slots: int, context_tokens: int
) -> Capacity:
    """A server's cache for so many tokens of either kind; SGLang sends padding to one more page, the first."""
    return Capacity(
        history_pages=history_tokens // page_tokens + 1,
        window_pages=window_tokens // page_tokens + 1,
        state_slots=state_slots,
        # No sequence is longer than the pool.
        max_seq_len=min(context_tokens, history_tokens) + page_tokens,
        reserved_pages=1,
    )


def bytes_by_pool(spec: CacheSpec, capacity: Capacity) -> dict[str, int]:
    """Bytes of a cache's tensors, by pool, the padding of groups included; nothing is allocated."""
    return CacheStorage(spec, capacity, NOWHERE).bytes_by_pool()


def size_of(spec: CacheSpec, size: ServerSize) -> int:
    """Bytes of a server's cache."""
    return sum(bytes_by_pool(spec, size.capacity(spec.page_tokens)).values())


def most_tokens(
    spec: CacheSpec, memory_bytes: int, requests: int, window_share: float, context_tokens: int = CONTEXT_TOKENS
) -> int:
    """The most tokens, in whole pages, whose cache fits into ``memory_bytes``; 0 where not even a page does."""

    def nbytes(pages: int) -> int:
        size = ServerSize(pages * spec.page_tokens, requests, window_share, context_tokens)
        return size_of(spec, size)

    return most_pages(nbytes, memory_bytes) * spec.page_tokens


def most_pages(nbytes: Callable[[int], int], available: int) -> int:
    """The most pages whose bytes are available; 0 where not even one page's are.

    Args:
        nbytes (Callable[[int], int]): bytes of so many pages; grows with them, and nearly in proportion, which saves tries.
        available (int): bytes.
    """
    first = nbytes(1)
    if first > available:
        return 0
    slope = (nbytes(1 + _SPAN) - first) / _SPAN
    low, step = 1 + int((available - first) / slope), 1
    while nbytes(low) > available:
        low, step = max(1, low - step), 2 * step
    high, step = low + 1, 1
    while nbytes(high) <= available:
        low, high, step = high, high + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if nbytes(middle) <= available else (low, middle)
    return low
