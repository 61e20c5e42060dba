"""What the server reports about the use of its pools and its memory."""

import mmap
from types import SimpleNamespace

import pytest
import torch

from sglang_dsv4.plugin.observe.occupancy import pool_usage, process_bytes


def test_memory_of_a_process():
    held = process_bytes(torch.device("cpu"))
    assert held["device_bytes"] == 0
    size = 64 << 20
    with mmap.mmap(-1, size) as more:  # new pages, whatever the process has given back to its heap
        more.write(b"x" * size)
        grown = process_bytes(torch.device("cpu"))["resident_bytes"] - held["resident_bytes"]
    assert grown > size // 2


def held(usage):
    """What is in use, pool by pool."""
    return [f"{pool}: {use['used']} of {use['total']}" for pool, use in usage.items() if use["used"] != 0]


def scheduler(held_tokens=0, free_slots=4):
    stats = SimpleNamespace(
        full_available_size=2048 - held_tokens,
        full_evictable_size=512,
        full_num_used=held_tokens,
        swa_available_size=1024,
        swa_evictable_size=256,
        swa_num_used=0,
    )
    slots = SimpleNamespace(size=4, available_size=lambda: free_slots)
    observer = SimpleNamespace(get_pool_stats=lambda: stats)
    return SimpleNamespace(pool_stats_observer=observer, req_to_token_pool=slots)


def test_the_use_of_pools_in_pages():
    usage = pool_usage(scheduler(), 256)
    assert usage["history_pages"] == {"total": 10, "free": 8, "cached": 2, "used": 0}
    assert usage["window_pages"] == {"total": 5, "free": 4, "cached": 1, "used": 0}
    assert held(usage) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"held_tokens": 256}, "history_pages: 1 of 10"),
        ({"held_tokens": 1}, "history_pages: 1 of 10"),
        ({"held_tokens": -256}, "history_pages: -1 of 10"),
        ({"free_slots": 3}, "request_slots: 1 of 4"),
    ],
)
def test_a_leak_of_less_than_a_page_shows(fault, message):
    assert held(pool_usage(scheduler(**fault), 256)) == [message]
