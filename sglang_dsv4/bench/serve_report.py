"""Numbers of `bench serve`: of a round, of all rounds, and of one side by the other."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
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
_NAMES = tuple(name for name, _, _ in METRICS)


def summarize(answers: Sequence[TimedReply]) -> dict[str, Any]:
    """One round's numbers.

    Raises:
        ValueError: there is no answer.
    """
    if not answers:
        raise ValueError("round: expected one answer or more, got none")
    wall_s = max(answer.arrivals[-1][0] for answer in answers) - min(answer.sent_s for answer in answers)
    times = {
        "ttft": [answer.first_token_s for answer in answers],
        "itl": [gap for answer in answers for gap in answer.gaps_s()] or [0.0],
    }
    tokens = {
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "output_tokens": sum(len(answer.token_ids) for answer in answers),
    }
    return {
        "requests": len(answers),
        "wall_s": wall_s,
        **tokens,
        **{f"{name}_per_s": count / wall_s for name, count in tokens.items()},
        **{f"{n}_p{p}_ms": 1e3 * float(np.percentile(values, p)) for n, values in times.items() for p in (50, 99)},
        "cached_share": sum(answer.cached_tokens for answer in answers) / tokens["prompt_tokens"],
    }


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The median over rounds of every number, and the least and the most of those that are compared."""
    found = {name: float(np.median([r[name] for r in rounds])) for name in rounds[0]}
    for name in _NAMES:
        values = [r[name] for r in rounds]
        found[f"{name}_min"], found[f"{name}_max"] = min(values), max(values)
    return found


def advantages(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How much better ours is in consecutive rounds, metric by metric: above 1 it is better.

    A machine that is slower for a while slows down both rounds of a pair, but not all rounds of one side.

    Args:
        ours (Sequence[dict[str, Any]]): the numbers of our rounds.
        theirs (Sequence[dict[str, Any]]): of the other side's, in the same order.

    Returns:
        dict[str, dict[str, float]]: the ``median`` of the pairs' ratios, and ``low`` and ``high``: `interval` around it.
    """
    found = {}
    for name, _, more in METRICS:
        pairs = np.array([(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)])
        if pairs.all():
            ratios = pairs[:, 0] / pairs[:, 1] if more else pairs[:, 1] / pairs[:, 0]
            low, high = interval(ratios)
            found[name] = {"median": float(np.median(ratios)), "low": low, "high": high}
    return found


def interval(values: Sequence[float], coverage: float = 0.95) -> tuple[float, float]:
    """The range that contains the median of many more such values with this probability, whatever their distribution.

    It is the narrowest pair of order statistics with that coverage. Fewer than six values have less, and give their whole range.
    """
    count = len(values)
    # An end of rank r misses the median when r or fewer values lie on its side of it.
    missed = 2 * np.cumsum([math.comb(count, number) for number in range(count + 1)]) / 2.0**count
    rank = max(0, int(np.searchsorted(missed, 1 - coverage, side="right")) - 1)
    ordered = sorted(values)
    return float(ordered[rank]), float(ordered[count - 1 - rank])


def rows(rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per scenario: medians of both sides, and how they compare.

    Args:
        rounds (Sequence[dict[str, Any]]): ``work``, ``side``, ``round`` and ``numbers`` of each.
    """
    found = []
    for work in dict.fromkeys(entry["work"] for entry in rounds):
        sides: dict[str, dict[int, dict[str, Any]]] = {}
        for entry in rounds:
            if entry["work"] == work:
                sides.setdefault(entry["side"], {})[entry["round"]] = entry["numbers"]
        row: dict[str, Any] = {"work": work} | {side: medians([*numbers.values()]) for side, numbers in sides.items()}
        both = sorted(sides.get(OURS, {}).keys() & sides.get(THEIRS, {}).keys())
        if both:
            row["ours_is_better"] = advantages(*([sides[side][number] for number in both] for side in (OURS, THEIRS)))
        found.append(row)
    return found


def table(found: Sequence[dict[str, Any]]) -> Table:
    """For a terminal: ours, then SGLang's own, then how much better ours is."""
    result = Table("work", "side", *(unit for _, unit, _ in METRICS), "cached")
    for row in found:
        for side in (OURS, THEIRS):
            if side in row:
                numbers = [f"{row[side][name]:.1f}" for name in _NAMES]
                result.add_row(row["work"], side, *numbers, f"{100 * row[side]['cached_share']:.0f} %")
        if better := row.get("ours_is_better"):
            result.add_row("", "ours is better", *(_share(better.get(name)) for name in _NAMES), "")
        result.add_section()
    return result


def _share(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['median']:.2f}x ({found['low']:.2f} - {found['high']:.2f})"
