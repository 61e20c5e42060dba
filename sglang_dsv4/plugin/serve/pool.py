"""SGLang's pool object over our storage.

SGLang asks for ``isinstance(pool, DeepSeekV4TokenToKVPool)`` in many places, so ours is a subclass; but every native
buffer is left out, and reading one raises.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

from sglang_dsv4.cache import ExternalKVCache
from sglang_dsv4.cache.sizing import GIB
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install.refusals import check_window_pool
from sglang_dsv4.plugin.serve.bound_weights import BoundWeights
from sglang_dsv4.plugin.serve.budget import PoolShape, shape_of
from sglang_dsv4.plugin.serve.running_step import RunningStep
from sglang_dsv4.spec import CacheSpec


class VacantPool:
    """Stands where SGLang would keep a native buffer; any use of it is a mistake and says so."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> NoReturn:
        raise UnsupportedError(f"native {self._what}.{name}: not allocated, CompressedKVCache holds the rows")


class CompressedTokenToKVPool(DeepSeekV4TokenToKVPool):
    """`CompressedKVCache` in the place of SGLang's DeepSeek-V4 pool.

    Page ids are SGLang's: a history page is a page of its allocator, a window page one of its sliding-window allocator.
    Page 0 of either is where SGLang sends padding; nothing reads it.

    Attributes:
        cache (ExternalKVCache): the rows, keys and state.
        weights (BoundWeights): SGLang's weights in the cache's layers.
        step (RunningStep): the step that is running.
        max_seq_len (int): tokens of the longest sequence.
    """

    def __init__(self, *, shape: PoolShape, **native: Any) -> None:
        super().__init__(**native)
        tokens = native["c128_size"] * 128
        capacity = shape.capacity(tokens, native["swa_size"])
        self.max_seq_len = min(shape.max_seq_len, tokens)
        self.cache = ExternalKVCache(shape.spec, capacity, native["device"], index_heads=shape.index_heads)
        self.weights = BoundWeights(self.cache.layers)
        self.step = RunningStep()
        self.mem_usage = self.get_kv_size_bytes() / GIB

    def get_kv_size_bytes(self) -> int:
        """Bytes of everything the cache allocated; SGLang reports it as its KV cache."""
        return self.cache.report().total_bytes

    def set_swa_key_buffer_radix_fused_norm_rope(
        self,
        layer_id: int,
        swa_loc: torch.Tensor,
        kv: torch.Tensor,
        kv_weight: torch.Tensor,
        eps: float,
        freqs_cis: torch.Tensor,
        positions: torch.Tensor,
        q: torch.Tensor | None = None,
    ) -> None:
        """Store window rows. Slots and positions come from the plan, RoPE from the cache's own table."""
        if q is not None:
            raise UnsupportedError("q: expected None, since queries are rotated in a launch of their own, got a tensor")
        del swa_loc, freqs_cis, positions
        self.weights.window(layer_id, kv_weight, eps).append(self.step.plan, window=kv)
        # SGLang drops its projections before it joins this stream; kept, their memory is not reused by then.
        self.step.kept = kv

    def get_ring_size(self, compress_ratio: int) -> int:
        """Rows of SGLang's native state ring; none, since stream state is ours."""
        del compress_ratio
        return 0

    def _make_kv_pool(self, **_: Any) -> VacantPool:
        return VacantPool("kv_pool")

    def _make_indexer_pool(self, *_: Any, **__: Any) -> VacantPool:
        return VacantPool("indexer_pool")

    # A version of SGLang calls the first two, or the third.
    def _make_attn_state_pool(self, *_: Any, **__: Any) -> VacantPool:
        return VacantPool("attn_state_pool")

    def _make_indexer_state_pool(self, *_: Any, **__: Any) -> VacantPool:
        return VacantPool("indexer_state_pool")

    def _make_compress_state_pool(self, *_: Any, **__: Any) -> VacantPool:
        return VacantPool("compress_state_pool")


def pool_factory(spec: CacheSpec, model_config: Any) -> Callable[..., CompressedTokenToKVPool]:
    """What SGLang calls with its own pool's arguments.

    Args:
        spec (CacheSpec): of the model.
        model_config (Any): SGLang's ModelConfig.
    """

    def build(**native: Any) -> CompressedTokenToKVPool:
        if native["page_size"] != spec.page_tokens:
            raise UnsupportedError(f"page size: expected {spec.page_tokens}, got {native['page_size']}")
        check_window_pool(native["swa_size"])
        shape = shape_of(spec, model_config, native["num_req_slots"], native["device"])
        return CompressedTokenToKVPool(shape=shape, **native)

    return build
