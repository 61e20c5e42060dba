"""Numbers of `bench serve`: of a round, of all rounds, and of one side by the other."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from sglang_dsv4.compare.client import Reply
from sglang_dsv4.compare.side import OURS, THEIRS

# Metric, unit for a reader, and whether more of it is better.
METRICS = (
    ("output_tokens_per_s", "new tokens/s", True),
    ("ttft_p50_ms", "TTFT p50, ms", False),
    ("ttft_p99_ms", "TTFT p99, ms", False),
    ("itl_p50_ms", "ITL p50, ms", False),
    ("itl_p99_ms", "ITL p99, ms", False),
)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies, by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summarize(replies: Sequence[Reply]) -> dict[str, Any]:
    """One round's numbers.

    Raises:
        ValueError: there is no reply.
    """
    if not replies:
        raise ValueError("round: expected one reply or more, got none")
    began = min(reply.sent_s for reply in replies)
    ended = max(reply.arrivals[-1][0] for reply in replies)
    first = [1e3 * reply.first_token_s for reply in replies]
    gaps = [1e3 * gap for reply in replies for gap in reply.gaps_s()] or [0.0]
    prompt = sum(reply.prompt_tokens for reply in replies)
    output = sum(len(reply.token_ids) for reply in replies)
    return {
        "requests": len(replies),
        "wall_s": ended - began,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "output_tokens_per_s": output / (ended - began),
        "prompt_tokens_per_s": prompt / (ended - began),
        "ttft_p50_ms": percentile(first, 0.5),
        "ttft_p99_ms": percentile(first, 0.99),
        "itl_p50_ms": percentile(gaps, 0.5),
        "itl_p99_ms": percentile(gaps, 0.99),
        "cached_share": sum(reply.cached_tokens for reply in replies) / prompt,
    }


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The median over rounds of every number, and the least and the most of those that are compared."""
    found = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    for name, _, _ in METRICS:
        values = [r[name] for r in rounds]
        found[f"{name}_min"], found[f"{name}_max"] = min(values), max(values)
    return found


def advantage(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """By how much ours is better, metric by metric: above 1 ours is."""
    return {
        name: ours[name] / theirs[name] if more else theirs[name] / ours[name]
        for name, _, more in METRICS
        if ours[name] and theirs[name]
    }


def rows(rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per scenario: medians of both sides, and how they compare.

    Args:
        rounds (Sequence[dict[str, Any]]): ``work``, ``side`` and ``numbers`` of each.
    """
    found = []
    for work in dict.fromkeys(entry["work"] for entry in rounds):
        row: dict[str, Any] = {"work": work}
        for side in dict.fromkeys(entry["side"] for entry in rounds):
            numbers = [e["numbers"] for e in rounds if e["work"] == work and e["side"] == side]
            if numbers:
                row[side] = medians(numbers)
        if OURS in row and THEIRS in row:
            row["ours_is_better"] = advantage(row[OURS], row[THEIRS])
        found.append(row)
    return found


def table(found: Sequence[dict[str, Any]]) -> Table:
    """For a terminal: ours, then SGLang's own, then by how much ours is better."""
    result = Table("work", "side", *(unit for _, unit, _ in METRICS), "cached")
    for row in found:
        for side in (OURS, THEIRS):
            if side in row:
                numbers = [f"{row[side][name]:.1f}" for name, _, _ in METRICS]
                result.add_row(
                    row["work"], side, *numbers, f"{100 * row[side]['cached_share']:.0f} %"
                )
        if "ours_is_better" in row:
            better = row["ours_is_better"]
            shares = [f"{better[name]:.2f}x" if name in better else "-" for name, _, _ in METRICS]
            result.add_row("", "ours is better", *shares, "")
        result.add_section()
    return result
