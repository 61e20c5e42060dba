"""Proof that our cache is the one running: one log line, and the same facts in /server_info."""

from dataclasses import asdict
from typing import Any

from sglang_dsv4 import __version__
from sglang_dsv4.cache import ExternalKVCache

_MIB = 1 << 20


def describe(cache: ExternalKVCache, attention: str, reason: str, portable_ops: list[str]) -> dict[str, Any]:
    """What runs, as plain values."""
    report = asdict(cache.report())
    report["requests"] = list(report["requests"])
    return {
        "version": __version__,
        "cache": "CompressedKVCache",
        "attention": attention,
        "attention_reason": reason,
        "kernels": cache.kernels.name,
        "index_scores": cache.kernels.index_scores,
        "device": str(cache.device),
        "portable_ops": portable_ops,
        "spec_digest": cache.spec.digest(),
        "report": report,
    }


def active_line(facts: dict[str, Any]) -> str:
    """The start-up line. It begins with ``sglang_dsv4 active:`` and nothing else does."""
    report = facts["report"]
    pools = ", ".join(f"{name} {size / _MIB:.1f} MiB" for name, size in report["bytes_by_pool"].items())
    return (
        f"sglang_dsv4 active: CompressedKVCache {facts['version']}, rows {report['row_format']}, "
        f"index keys {report['index_format']}, kernels {facts['kernels']}, index scores {facts['index_scores']}, "
        f"attention {facts['attention']} on {facts['device']} ({facts['attention_reason']}), "
        f"{report['max_tokens']} tokens in pages of {report['page_tokens']}, {report['counts']['state_slots']} requests, "
        f"{report['total_bytes'] / _MIB:.1f} MiB ({pools}), "
        f"portable ops: {', '.join(facts['portable_ops']) or 'none'}"
    )
