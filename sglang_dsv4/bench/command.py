"""``bench``, and ``bench kernels``."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sglang_dsv4.bench import attention_command, cuts, flush, index, peer_index, peer_sglang, serve_command, step_plan, window
from sglang_dsv4.bench.machine import environment, need_cuda
from sglang_dsv4.bench.timing import copy_bandwidth

OPS = (flush, window, step_plan, index)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``bench``."""
    parser = subparsers.add_parser(
        "bench",
        help="time the kernels on a GPU, cuts of a sequence, or whole servers, each checked before it is timed",
        description="Time the kernels or the attention on a GPU, or cuts of a sequence or whole servers on any machine. What "
        "is wrong is not timed.",
    )
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    kernels = what.add_parser(
        "kernels",
        help="the cache's kernels, next to SGLang's and to the torch references",
        description="Time flush, window store, step plan and selection on a GPU, next to SGLang's kernels and to the torch "
        "references that they were checked against. SGLang, DeepGEMM and FlashInfer take part where they are installed.",
    )
    kernels.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, and where they were measured, to this file"
    )
    kernels.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="run only rows whose op and case contain this text, such as 'flush csa decode'",
    )
    kernels.add_argument("--quick", action="store_true", help="fewer cases")
    kernels.set_defaults(func=run)
    attention_command.add_parser(what)
    cuts.add_parser(what)
    serve_command.add_parser(what)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status."""
    need_cuda("kernels")
    console = Console(width=160)
    missing = sorted({reason for reason in (peer_sglang.load()[1], *peer_index.missing()) if reason})
    bandwidth = copy_bandwidth()
    where = environment(bandwidth)
    versions = where["versions"]
    console.print(f"{where['gpu']}, copy {bandwidth / 1e3:,.0f} GB/s, torch {versions['torch']}, triton {versions['triton']}")
    found = []
    for row in _rows(bandwidth, args.quick, args.only):
        found.append(row)
        console.print(_line(row))
        if args.json:
            report = {"environment": where, "not_run": missing, "rows": found}
            args.json.write_text(json.dumps(report, indent=1))
    console.print(_table(found))
    for reason in missing:
        console.print(f"Not run: {reason}")
    return 0


def _rows(bandwidth: float, quick: bool, only: str) -> Iterator[dict]:
    for op in OPS:
        yield from op.rows(bandwidth, quick, only)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _line(row: dict) -> str:
    return (
        f"{row['op']:16} {row['case']:28} {row['row_format']:8} {row['us']:9.2f} us, "
        f"SGLang {_number(row['sglang_us'])}, torch {_number(row['torch_us'], 0)}"
    )


def _table(rows: list[dict]) -> Table:
    table = Table("op", "case", "rows", "in", "us", "p10-p90", "in L2", "MB", "% of copy", "SGLang us", "ratio", "torch us")
    for row in rows:
        peer = row["sglang_us"]
        table.add_row(
            row["op"],
            row["case"],
            row["row_format"],
            row["input_dtype"],
            f"{row['us']:.2f}",
            f"{row['p10_us']:.2f}-{row['p90_us']:.2f}",
            _number(row.get("warm_us")),
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['copy_percent']:.0f}",
            _number(peer),
            "-" if peer is None else f"{peer / row['us']:.2f}x",
            _number(row["torch_us"], 0),
        )
    return table
