"""Numbers of `bench serve`: of a round, of all rounds, and of one side by the other."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from sglang_dsv4.bench.timed_stream import TimedReply
from sglang_dsv4.check.server import OURS, THEIRS

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


def summarize(replies: Sequence[TimedReply]) -> dict[str, Any]:
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


def advantages(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By how much ours is better in rounds that followed each other, metric by metric: above 1 it is.

    A machine that is slower for a while is so for both rounds of a pair, but not for all of one side.

    Args:
        ours (Sequence[dict[str, Any]]): the numbers of our rounds.
        theirs (Sequence[dict[str, Any]]): of the other side's, in the same order.

    Returns:
        dict[str, dict[str, float]]: the ``median`` of the pairs' ratios, and ``low`` and ``high``: `interval` around it.
    """
    found = {}
    for name, _, more in METRICS:
        pairs = [(a[name], b[name]) if more else (b[name], a[name]) for a, b in zip(ours, theirs, strict=True)]
        if all(value for pair in pairs for value in pair):
            ratios = [better / worse for better, worse in pairs]
            low, high = interval(ratios)
            found[name] = {"median": statistics.median(ratios), "low": low, "high": high}
    return found


def interval(values: Sequence[float], coverage: float = 0.95) -> tuple[float, float]:
    """Where the median lies that many more such values would have, with this probability, whatever their distribution.

    It is the narrowest pair of order statistics that has the coverage; of fewer than six values all, which have less.
    """
    ordered, count = sorted(values), len(values)
    outside, rank = 0.0, 0
    # Both ends miss the median when fewer than ``rank + 1`` values lie on a side of it.
    while rank < (count - 1) // 2:
        outside += 2 * math.comb(count, rank) / 2**count
        more = outside + 2 * math.comb(count, rank + 1) / 2**count
        if more > 1 - coverage:
            break
        rank += 1
    return ordered[rank], ordered[count - 1 - rank]


def rows(rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per scenario: medians of both sides, and how they compare.

    Args:
        rounds (Sequence[dict[str, Any]]): ``work``, ``side``, ``round`` and ``numbers`` of each.
    """
    found = []
    for work in dict.fromkeys(entry["work"] for entry in rounds):
        row: dict[str, Any] = {"work": work}
        by_side: dict[str, dict[int, dict[str, Any]]] = {}
        for entry in rounds:
            if entry["work"] == work:
                by_side.setdefault(entry["side"], {})[entry["round"]] = entry["numbers"]
        for side, numbers in by_side.items():
            row[side] = medians(list(numbers.values()))
        both = sorted(by_side.get(OURS, {}).keys() & by_side.get(THEIRS, {}).keys())
        if both:
            pairs = ([by_side[side][number] for number in both] for side in (OURS, THEIRS))
            row["ours_is_better"] = advantages(*pairs)
        found.append(row)
    return found


def table(found: Sequence[dict[str, Any]]) -> Table:
    """For a terminal: ours, then SGLang's own, then by how much ours is better."""
    result = Table("work", "side", *(unit for _, unit, _ in METRICS), "cached")
    for row in found:
        for side in (OURS, THEIRS):
            if side in row:
                numbers = [f"{row[side][name]:.1f}" for name, _, _ in METRICS]
                result.add_row(row["work"], side, *numbers, f"{100 * row[side]['cached_share']:.0f} %")
        if "ours_is_better" in row:
            better = row["ours_is_better"]
            shares = [_share(better.get(name)) for name, _, _ in METRICS]
            result.add_row("", "ours is better", *shares, "")
        result.add_section()
    return result


def _share(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    return f"{found['median']:.2f}x ({found['low']:.2f} - {found['high']:.2f})"
