"""``bench attention``."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from sglang_dsv4.bench import attention
from sglang_dsv4.bench.machine import environment, need_cuda
from sglang_dsv4.bench.timing import copy_bandwidth


def add_parser(what: argparse._SubParsersAction) -> None:
    """Register ``attention`` under ``bench``."""
    parser = what.add_parser(
        "attention",
        help="attention over the cache: FlashInfer, FlashMLA and torch, each checked first",
        description="Time one layer's attention over the cache on a GPU: FlashInfer with our schedule and with its own, "
        "FlashMLA, and torch. Every result is compared with fp64 first. FlashInfer and FlashMLA take part where they are "
        "installed.",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, and where they were measured, to this file"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="run only cases whose name and row format contain this text")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status."""
    need_cuda("attention")
    console = Console(width=160)
    where = environment(copy_bandwidth())
    console.print(f"{where['gpu']}, copy {where['copy_bytes_per_us'] / 1e3:,.0f} GB/s, torch {where['versions']['torch']}")
    found: list[dict] = []
    missing: set[str] = set()
    for row in attention.rows(where["copy_bytes_per_us"], args.quick, args.only, missing):
        found.append(row)
        error = "" if row.get("error") is None else f", error {row['error']:.2f} of the allowed"
        console.print(f"{row['case']:34} {row['row_format']:8} {row['variant']:16} {row['us']:9.2f} us{error}")
        if args.json:
            report = {"environment": where, "not_run": sorted(missing), "rows": found}
            args.json.write_text(json.dumps(report, indent=1))
    for line in sorted(missing):
        console.print(f"Not run: {line}")
    return 0
