"""What a server says about its pools, by itself and in its log."""

import re
from typing import Any

import httpx

from sglang_dsv4.check.server import Server

# What a server logs when it sizes its pools: bytes of a token, and available GiB; SGLang's own line, and ours on a GPU.
_SIZING = (
    re.compile(r"bytes_per_full_token=(?P<token>[\d.]+), available_bytes=(?P<all>[\d.]+) GB"),
    re.compile(r"tokens fit into (?P<all>[\d.]+) GiB \((?P<token>[\d.]+) bytes a token"),
)


def facts_of(server: Server) -> dict[str, Any]:
    """The pools of one server.

    Returns:
        dict[str, Any]: ``tokens_that_fit``; ``memory``, SGLang's own figures in GB; ``sizing_bytes_per_token`` by which it
            sized its pools (window rows at their share, without state per request) and ``sizing_gb``, both None where the
            number of tokens was given; with our cache ``pools``, bytes by pool.

    Raises:
        ValueError: our cache is not as the side asks: on, or off.
    """
    info = httpx.get(f"{server.url}/server_info", timeout=60, trust_env=False)
    state = info.raise_for_status().json()["internal_states"][0]
    sizing = [found for line in server.log_lines() for pattern in _SIZING if (found := pattern.search(line))]
    facts: dict[str, Any] = {
        "options": [*server.side.options],
        "tokens_that_fit": state["memory_usage"]["token_capacity"],
        "memory": state["memory_usage"],
        "sizing_bytes_per_token": float(sizing[-1]["token"]) if sizing else None,
        "sizing_gb": float(sizing[-1]["all"]) if sizing else None,
    }
    ours = state.get("sglang_dsv4")
    if (ours is not None) != server.side.is_ours:
        wanted, got = ("on", "off") if server.side.is_ours else ("off", "on")
        raise ValueError(f"server {server.side.name}: expected our cache {wanted}, got {got}")
    if ours is not None:
        report = ours["report"]
        facts |= {"attention": ours["attention"], "kernels": ours["kernels"], "pools": report["bytes_by_pool"]}
        facts |= {"row_format": report["row_format"], "pool_bytes_per_token": report["total_bytes"] / report["max_tokens"]}
    return facts
