"""The last look before a scheduler takes requests, and what it says of itself later."""

import logging
from typing import Any

from sglang_dsv4.plugin.install import versions
from sglang_dsv4.plugin.observe.occupancy import pool_usage, process_bytes

logger = logging.getLogger(__name__)


def check_serving(scheduler: Any) -> None:
    """End a scheduler that is about to say that it is ready, and would serve with another cache than ours.

    The checks of the arguments know a checkpoint by its configuration; what SGLang made of it is known only here.
    """
    from sglang_dsv4.plugin.serve.backend import CompressedKVBackend
    from sglang_dsv4.plugin.serve.pool import CompressedTokenToKVPool

    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    backend = scheduler.tp_worker.model_runner.attn_backend
    for what, found, expected in (
        ("KV pool", pool, CompressedTokenToKVPool),
        ("attention backend", backend, CompressedKVBackend),
    ):
        if not isinstance(found, expected):
            kind = type(found)
            raise SystemExit(f"sglang_dsv4: not active, the {what} is {kind.__module__}.{kind.__qualname__}")


def internal_state(result: Any, scheduler: Any, *_: Any, **__: Any) -> Any:
    """Hook after ``Scheduler.get_internal_state``: what /server_info says of the cache."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    backend = scheduler.tp_worker.model_runner.attn_backend
    usage = pool_usage(scheduler, pool.cache.spec.page_tokens)
    checks = {"level": "off"} if backend.checks is None else backend.checks.facts()
    result.internal_state["sglang_dsv4"] = {
        **pool.facts,
        "prefix_cache": versions.installed().prefix_cache(scheduler.tree_cache),
        "steps": dict(backend.steps),
        "usage": usage,
        "attention_bytes": backend.attention_bytes(),
        "checks": checks,
        "digests": {} if backend.checks is None else dict(backend.checks.digests),
        "memory": process_bytes(pool.cache.device),
    }
    return result
