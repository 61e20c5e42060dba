"""SGLang's pools, built over our cache and sized by the bytes that it allocates."""

import logging
from collections.abc import Callable
from typing import Any

from dsv4_kernels import memory
from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install import options, versions
from sglang_dsv4.plugin.install.checkpoint import PAGE_TOKENS
from sglang_dsv4.spec import CacheSpec

logger = logging.getLogger(__name__)

_MOST_REQUESTS = 4096  # where nobody named a number, SGLang takes no more


def _spec_of(model_config: Any) -> CacheSpec:
    return CacheSpec.from_hf(model_config.hf_config, page_tokens=PAGE_TOKENS, **options.read().formats())


def build_pool(original: Callable[..., Any], configurator: Any, **kwargs: Any) -> Any:
    """Hook around the method of SGLang that builds a DeepSeek-V4 pool."""
    from sglang.srt.mem_cache import kv_cache_configurator

    from sglang_dsv4.plugin.serve.pool import pool_factory

    if configurator.is_draft_worker:
        raise UnsupportedError("speculative decoding: not supported with --enable-dsv4-compressed-kv")
    # For debugging: whatever was not written is NaN, so that a server that answers right has read nothing unwritten.
    memory.set_poison(env.is_enabled(env.POISON))
    native = kv_cache_configurator.DeepSeekV4TokenToKVPool
    kv_cache_configurator.DeepSeekV4TokenToKVPool = pool_factory(_spec_of(configurator.model_config), configurator.model_config)
    try:
        pool = original(configurator, **kwargs)
    finally:
        kv_cache_configurator.DeepSeekV4TokenToKVPool = native
    versions.installed().check_pool(pool)
    return pool


def size_pools(result: None, sizes: Any, configurator: Any) -> None:
    """Hook after SGLang's configurator of pools is made: our bytes a token."""
    from sglang_dsv4.plugin.serve.budget import bytes_per_token

    spec = _spec_of(configurator.model_config)
    sizes.sglang_dsv4 = (spec, configurator.model_config, configurator.device)
    sizes.bytes_per_full_token = bytes_per_token(spec, versions.installed().window_share(sizes))


def fit_pools(original: Callable[..., Any], sizes: Any, available_bytes: int, page_size: int) -> Any:
    """Sizes of SGLang's pools, so that our cache takes what it was given."""
    from sglang_dsv4.plugin.serve.budget import shape_of

    del original
    spec, model_config, device = sizes.sglang_dsv4
    requests = sizes.requested_max_running_requests_per_worker or _MOST_REQUESTS
    shape = shape_of(spec, model_config, sizes._get_num_req_slots(requests), device)

    def window_tokens(tokens: int) -> int:
        return versions.installed().window_tokens(sizes, tokens, page_size)

    tokens = shape.most_tokens(available_bytes, window_tokens)
    logger.info(
        "sglang_dsv4: %d tokens fit into %.2f GiB (%.1f bytes a token, %d requests)",
        tokens,
        available_bytes / (1 << 30),
        sizes.bytes_per_full_token,
        requests,
    )
    return sizes._to_config(sizes._compute_dsv4_sizes(tokens, page_size))
