"""``python -m sglang_dsv4 demo``."""

import argparse
import asyncio
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from sglang_dsv4.check.checkpoint import ready_checkpoint
from sglang_dsv4.check.client import Client
from sglang_dsv4.check.command_line import add_build_dir, check_arguments, run_guarded, started, steps_progress
from sglang_dsv4.check.demo.report import print_answers, print_memory, print_verdict
from sglang_dsv4.check.demo.standards import build_standards, num_steps
from sglang_dsv4.check.demo.workload import NEW_TOKENS, Answer, ask_waves, check_answers, plan_requests
from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.check.rounding import ROUNDINGS
from sglang_dsv4.check.server import TINY_CAPACITY, Server, Side, active_line
from sglang_dsv4.tiny import TinySpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``demo``."""
    parser = subparsers.add_parser(
        "demo",
        help="serve a tiny checkpoint with SGLang and check every answer",
        description="Serve a tiny random-weight DeepSeek-V4 with SGLang and CompressedKVCache on the CPU, send requests "
        "at the same time, and compare every answer with transformers. Exit status 0 only if all is right.",
    )
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32", help="arithmetic (default: %(default)s)")
    parser.add_argument("--dsv4-kv-format", choices=sorted(ROUNDINGS), default="bf16", help="row format (default: %(default)s)")
    add_build_dir(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; the exit status."""
    console = Console()
    with steps_progress(console) as progress:
        return run_guarded(lambda: _demonstrate(args, console, progress), console)


def _demonstrate(args: argparse.Namespace, console: Console, progress: Progress) -> int:
    check_arguments(args)
    task = progress.add_task("checkpoint", total=1)
    checkpoint = ready_checkpoint(args.build_dir / "tiny", TinySpec())
    progress.advance(task)
    oracle = Oracle(checkpoint)
    options = (*TINY_CAPACITY, "--dtype", args.dtype, "--dsv4-kv-format", args.dsv4_kv_format)
    with started(Server(Side("demo-server", True, options), checkpoint, args.build_dir), progress) as server:
        answers, facts = asyncio.run(_ask(server.url, oracle.vocab_size, progress))
        server.check_alive()
        line = active_line(server.log_lines())
    dtype = _DTYPES[args.dtype]
    task = progress.add_task("checking with transformers", total=num_steps(answers, dtype))
    advance = partial(progress.advance, task)
    standards = build_standards(oracle, answers, dtype=dtype, row_format=args.dsv4_kv_format, step=advance)
    progress.stop()

    faults = [] if line is not None else ["the server's log has no line that says `sglang_dsv4 active:`"]
    faults += check_answers(answers, NEW_TOKENS)
    faults += [fault for standard in standards for fault in standard.faults()]
    print_answers(console, answers)
    if line is not None:
        console.print(Text(line))
    print_memory(console, facts)
    print_verdict(console, standards, faults)
    console.print(f"The server's log is {server.log}.")
    return 1 if faults else 0


async def _ask(url: str, vocab_size: int, progress: Progress) -> tuple[list[Answer], dict[str, Any]]:
    """The answers to all requests, and what the plug-in says about itself."""
    requests = plan_requests()
    task = progress.add_task("requests", total=len(requests))
    async with Client(url) as client:
        answers = await ask_waves(client, requests, NEW_TOKENS, vocab_size, lambda: progress.advance(task))
        return answers, await client.plugin_facts()
