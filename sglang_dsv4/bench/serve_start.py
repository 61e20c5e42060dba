"""Two servers on one device, with the same bytes for their pools."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from sglang_dsv4.check.server import Server, Side, wait_until_ready


def free_bytes(device: str) -> int:
    """Bytes of a GPU that nobody holds; 0 on a CPU."""
    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else 0


def same_share(fraction: float, at_first: int, now: int) -> float:
    """``--mem-fraction-static`` of a server that starts beside others, so that its pools get as much as the first one's.

    SGLang takes the fraction of what is free when it starts.

    Args:
        fraction (float): of the first server.
        at_first (int): bytes that were free when it started.
        now (int): bytes free now.

    Raises:
        ValueError: there is not as much left.
    """
    if not now:
        return fraction
    share = fraction * at_first / now
    if share > 0.95:
        raise ValueError(f"--mem-fraction {fraction}: expected room for as much again, got {now >> 20} MiB free; choose less")
    return share


def start_in_turn(sides: Iterable[Side], fraction: float, device: str, enter: Callable[[Side], Server]) -> list[Server]:
    """Start sides one after the other, each with the same bytes for its pools; ``enter`` starts one."""
    servers: list[Server] = []
    at_first = free_bytes(device)
    for side in sides:
        share = same_share(fraction, at_first, free_bytes(device))
        server = enter(replace(side, options=(*side.options, "--mem-fraction-static", f"{share:.4f}")))
        wait_until_ready([server])
        servers.append(server)
    return servers


def start_at_once(sides: Iterable[Side], tokens: int, enter: Callable[[Side], Server]) -> list[Server]:
    """Start sides at the same time with pools of this many tokens; ``enter`` starts one.

    The share of memory only has to be large: SGLang counts what others allocate during a start as its own.
    """
    pool = ("--max-total-tokens", str(tokens), "--mem-fraction-static", "0.8")
    servers = [enter(replace(side, options=(*side.options, *pool))) for side in sides]
    wait_until_ready(servers)
    return servers
