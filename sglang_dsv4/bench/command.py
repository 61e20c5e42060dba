"""``bench kernels`` and ``bench cuts``."""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table

from sglang_dsv4.bench import cuts, flush, peer_sglang
from sglang_dsv4.bench.timing import copy_bandwidth


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``bench``."""
    parser = subparsers.add_parser(
        "bench", help="time kernels, or cuts of a sequence, each checked before it is timed"
    )
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    kernels = what.add_parser(
        "kernels", help="the cache's kernels, next to SGLang's and to the torch references"
    )
    kernels.add_argument(
        "--json", type=Path, help="also write the rows, and where they were measured, to this file"
    )
    kernels.add_argument(
        "--only", default="", help="run only rows whose op and case contain this text"
    )
    kernels.add_argument("--quick", action="store_true", help="fewer cases")
    kernels.set_defaults(func=run)
    cuts.add_parser(what)


def environment(bandwidth: float) -> dict:
    """Where the rows were measured."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "copy_bytes_per_us": bandwidth,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where there is no GPU."""
    console = Console(width=160)
    if not torch.cuda.is_available():
        print("bench kernels: expected a CUDA device, found none; nothing was run", file=sys.stderr)
        return 1
    _, missing = peer_sglang.load()
    if missing:
        console.print(f"SGLang's kernels are not timed: {missing}")
    bandwidth = copy_bandwidth()
    where = environment(bandwidth)
    console.print(
        f"{where['gpu']}, copy {bandwidth / 1e3:,.0f} GB/s, torch {where['torch']}, triton {where['triton']}"
    )
    found = []
    for row in flush.rows(bandwidth, args.quick, args.only):
        found.append(row)
        console.print(_line(row))
        if args.json:
            args.json.write_text(json.dumps({"environment": where, "rows": found}, indent=1))
    console.print(_table(found))
    return 0


def _line(row: dict) -> str:
    peer = "-" if row["sglang_us"] is None else f"{row['sglang_us']:.2f}"
    return f"{row['op']:16} {row['case']:24} {row['us']:9.2f} us, SGLang {peer}, torch {row['torch_us']:.0f}"


def _table(rows: list[dict]) -> Table:
    table = Table(
        "op",
        "case",
        "rows",
        "in",
        "us",
        "p10-p90",
        "MB",
        "% of copy",
        "SGLang us",
        "ratio",
        "torch us",
    )
    for row in rows:
        peer = row["sglang_us"]
        table.add_row(
            row["op"],
            row["case"],
            row["row_format"],
            row["input_dtype"],
            f"{row['us']:.2f}",
            f"{row['p10_us']:.2f}-{row['p90_us']:.2f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['copy_percent']:.0f}",
            "-" if peer is None else f"{peer:.2f}",
            "-" if peer is None else f"{peer / row['us']:.2f}x",
            f"{row['torch_us']:.0f}",
        )
    return table
