"""How much of each pool SGLang's allocators have given out, and what the scheduler's process holds."""

from typing import Any

import psutil
import torch


def pool_usage(scheduler: Any, page_tokens: int) -> dict[str, dict[str, int]]:
    """Pages and request slots, by pool.

    Args:
        scheduler (Any): SGLang's Scheduler.
        page_tokens (int): tokens of a page; SGLang counts tokens.

    Returns:
        dict[str, dict[str, int]]: for each pool ``total``; ``free``; ``cached``, which the prefix cache holds and would
            give up; and ``used``, the rest: without a request it is 0.
    """
    stats = scheduler.pool_stats_observer.get_pool_stats()
    slots = scheduler.req_to_token_pool
    free = slots.available_size()
    return {
        "history_pages": _pages(stats.full_available_size, stats.full_evictable_size, stats.full_num_used, page_tokens),
        "window_pages": _pages(stats.swa_available_size, stats.swa_evictable_size, stats.swa_num_used, page_tokens),
        "request_slots": {"total": slots.size, "free": free, "cached": 0, "used": slots.size - free},
    }


def process_bytes(device: torch.device) -> dict[str, int]:
    """Memory of this process: ``resident_bytes`` of the host, and ``device_bytes`` that torch has given out, 0 on a CPU."""
    return {
        "resident_bytes": psutil.Process().memory_info().rss,
        "device_bytes": torch.cuda.memory_allocated(device) if device.type == "cuda" else 0,
    }


def _pages(free: int, cached: int, used: int, page_tokens: int) -> dict[str, int]:
    """Tokens as pages; what is used is rounded away from 0."""
    in_use = -(-abs(used) // page_tokens) * (1 if used >= 0 else -1)
    sizes = {"total": free + cached + used, "free": free, "cached": cached}
    return {**{name: size // page_tokens for name, size in sizes.items()}, "used": in_use}
