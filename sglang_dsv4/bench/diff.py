"""``bench diff``: the rows of two versions side by side; a row is slower where even its spread does not explain it."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

# What names a row; a row of `bench kernels` has no variant.
NAME = ("op", "case", "row_format", "input_dtype", "variant")


@dataclass(frozen=True)
class Times:
    """Microseconds of one row over all runs: the median of the runs' medians, the least p10 and the greatest p90."""

    us: float
    low: float
    high: float


def read(path: Path) -> dict[str, Times]:
    """Rows by name.

    Args:
        path (Path): what ``--json`` wrote, or a folder of several such files.

    Raises:
        ValueError: there is no such file, or one has no rows.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{path}: expected a file that bench --json wrote, or a folder of them, got none")
    for file in files:
        report = json.loads(file.read_text(encoding="utf-8"))
        rows = report.get("rows") if isinstance(report, dict) else None
        if not rows or not all({"op", "case", "us"} <= row.keys() for row in rows):
            raise ValueError(f"{file}: expected rows of bench kernels or bench attention, got none")
        for row in rows:
            runs.setdefault(" ".join(str(row[key]) for key in NAME if row.get(key)), []).append(row)
    return {name: _times(rows) for name, rows in runs.items()}


def _times(rows: Sequence[dict[str, Any]]) -> Times:
    low, high = (pick(row.get(key, row["us"]) for row in rows) for pick, key in ((min, "p10_us"), (max, "p90_us")))
    return Times(float(np.median([row["us"] for row in rows])), low, high)


def verdict(before: Times | None, after: Times | None) -> str:
    """``slower`` or ``faster`` where the median moved by more than either spread, and the two spreads lie apart."""
    if before is None or after is None:
        return "new" if before is None else "missing"
    spread = max(before.high - before.low, after.high - after.low)
    if after.us - before.us > spread and after.low > before.high:
        return "slower"
    return "faster" if before.us - after.us > spread and after.high < before.low else ""


def add_parser(what: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``diff`` under ``bench``."""
    parser = what.add_parser(
        "diff",
        help="rows of two versions side by side; fails where one is slower by more than its spread",
        description="Compare what bench kernels --json or bench attention --json wrote with two versions. Exits with 1 where a "
        "row is slower by more than its spread over rounds and runs, or is missing.",
    )
    parser.add_argument("before", type=Path, help="a file, or a folder with a file for each run")
    parser.add_argument("after", type=Path, help="likewise, of the version to judge")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; the exit status."""
    console = Console(width=160)
    try:
        before, after = read(args.before), read(args.after)
    except (ValueError, OSError) as fault:
        console.print(f"FAILED  {fault}", style="bold red", markup=False)
        return 1
    table = Table("row", "before, us", "p10-p90", "after, us", "p10-p90", "after / before", "")
    found: dict[str, list[str]] = {}
    for name in before | after:
        sides = (before.get(name), after.get(name))
        cells = [cell for t in sides for cell in ((f"{t.us:.2f}", f"{t.low:.2f}-{t.high:.2f}") if t else ("-", "-"))]
        ratio = f"{after[name].us / before[name].us:.3f}" if all(sides) else "-"
        found.setdefault(verdict(*sides), []).append(name)
        table.add_row(name, *cells, ratio, verdict(*sides))
    console.print(table)
    ratios = [after[name].us / before[name].us for name in before.keys() & after.keys()]
    counts = ", ".join(f"{len(found.get(kind, []))} {kind}" for kind in ("slower", "faster", "missing", "new"))
    middle = f"; median of after / before {np.median(ratios):.3f}" if ratios else ""
    console.print(f"{len(before | after)} rows: {counts}{middle}")
    return int("slower" in found or "missing" in found)
