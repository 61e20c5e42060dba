"""``bench``, and what ``bench kernels`` and ``bench attention`` share."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from sglang_dsv4.bench import attention, cuts, diff, flush, host, index, serve_command, step_plan
from sglang_dsv4.bench.diff import NAME
from sglang_dsv4.bench.job import load, measure
from sglang_dsv4.bench.timing import copy_bandwidth, need_cuda
from sglang_dsv4.check.machine import environment

Parsers = "argparse._SubParsersAction[argparse.ArgumentParser]"
_COLUMNS = (*NAME, "shape", "us", "p10_us", "p90_us", "bytes", "copy_percent")


def add_parser(subparsers: Parsers) -> None:
    """Register ``bench``."""
    parser = subparsers.add_parser(
        "bench",
        help="time the kernels on a GPU, cuts of a sequence, or whole servers, each checked before it is timed",
        description="Time the kernels or the attention on a GPU, or cuts of a sequence or whole servers on any machine. What "
        "is wrong is not timed.",
    )
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    _add_measured(
        what,
        "kernels",
        (flush, step_plan, index),
        help="the cache's kernels, next to SGLang's and to the torch references",
        description="Time flush, window store, step plan and selection on a GPU, next to SGLang's kernels and to the torch "
        "references that they were checked against. SGLang, DeepGEMM and FlashInfer take part where they are installed.",
        only="run only rows whose op and case contain this text, such as 'flush csa decode'",
    )
    _add_measured(
        what,
        "attention",
        (attention,),
        help="attention over the cache: FlashInfer, FlashMLA and torch, each checked first",
        description="Time one layer's attention over the cache on a GPU: FlashInfer with our schedule and with its own, "
        "FlashMLA, and torch. Every result is compared with fp64 first. FlashInfer and FlashMLA take part where they are "
        "installed.",
        only="run only cases whose name and row format contain this text",
    )
    for module in (cuts, host, serve_command, diff):
        module.add_parser(what)


def _add_measured(what: Parsers, name: str, ops: Sequence[ModuleType], only: str, **texts: str) -> None:
    parser = what.add_parser(name, **texts)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, and where they were measured, to this file"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help=only)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.set_defaults(func=partial(run, ops))


def run(ops: Sequence[ModuleType], args: argparse.Namespace) -> int:
    """Check and time every job of some operations; the exit status."""
    device = need_cuda(args.what)
    console = Console(width=200)
    missing = sorted({reason for op in ops for name in op.PEERS if (reason := load(name)[1])})
    bandwidth = copy_bandwidth()
    where = environment("cuda") | {"copy_bytes_per_us": bandwidth}
    versions = where["versions"]
    console.print(f"{where['gpu']}, copy {bandwidth / 1e3:,.0f} GB/s, torch {versions['torch']}, triton {versions['triton']}")
    rows: list[dict[str, Any]] = []
    for name, jobs in (named for op in ops for named in op.jobs(args.quick, device)):
        if args.only not in name:
            continue
        for job in jobs():
            for row in measure(job, bandwidth):
                rows.append(row)
                console.print(line(row))
                if args.json:
                    args.json.write_text(json.dumps({"environment": where, "not_run": missing, "rows": rows}, indent=1))
        torch.cuda.empty_cache()
    for reason in missing:
        console.print(f"Not run: {reason}")
    return 0


def line(row: dict[str, Any]) -> str:
    """A row for a terminal: its name, its time and spread, then every further column; peers with their ratio to ours."""
    shown = []
    for name, value in row.items():
        if name not in _COLUMNS:
            text = f"{value:.2f}" if isinstance(value, float) else str(value)
            ratio = f" ({value / row['us']:.2f}x)" if name.endswith("_us") and not name.startswith("plan_") else ""
            shown.append(f"{name.removesuffix('_us')} {text}{ratio}")
    title = " ".join(str(row[name]) for name in NAME if row.get(name))
    speed = f"{row['us']:9.2f} us ({row['p10_us']:.2f}-{row['p90_us']:.2f}) {row['copy_percent']:4.0f} % of a copy"
    return f"{title:60} {speed}  {', '.join(shown)}"
