"""``python -m sglang_dsv4 demo``."""

import argparse
import signal
from pathlib import Path

import httpx
import torch
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from sglang_dsv4.check.demo.client import Client
from sglang_dsv4.check.demo.report import print_answers, print_memory, print_verdict
from sglang_dsv4.check.demo.server import Server, ServerDiedError, active_line, leave
from sglang_dsv4.check.demo.standards import build_standards, num_steps
from sglang_dsv4.check.demo.start import ready_checkpoint, steps_progress, wait_until_healthy
from sglang_dsv4.check.demo.verdict import check_lengths, check_prefix_hits, check_proof, judge
from sglang_dsv4.check.demo.workload import NEW_TOKENS, plan_requests
from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.check.rounding import ROUNDINGS

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
    parser.add_argument(
        "--build-dir",
        type=Path,
        metavar="DIR",
        default=Path("build"),
        help="for the checkpoint and the log (default: %(default)s)",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; the exit status."""
    # A `kill` must end the server too: as an exception it passes through the `with` block that owns it.
    signal.signal(signal.SIGTERM, leave)
    console = Console()
    try:
        with steps_progress(console) as progress:
            return _demonstrate(args, console, progress)
    except (ServerDiedError, TimeoutError, httpx.HTTPError, ValueError, OSError) as error:
        console.print(Text(f"FAILED  {type(error).__name__}: {error}", style="bold red"))
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 128 + signal.SIGINT


def _demonstrate(args: argparse.Namespace, console: Console, progress: Progress) -> int:
    checkpoint = ready_checkpoint(args.build_dir / "tiny", progress)
    oracle = Oracle(checkpoint)
    requests = plan_requests()
    log = args.build_dir / "demo-server.log"
    with Server(checkpoint, log, ("--dtype", args.dtype, "--dsv4-kv-format", args.dsv4_kv_format)) as server:
        client = Client(server.url, oracle.vocab_size)
        wait_until_healthy(server, client, progress)
        task = progress.add_task("requests", total=len(requests))
        answers = client.run(requests, NEW_TOKENS, lambda: progress.advance(task))
        facts = client.plugin_facts()
        client.close()
        server.check_alive()
        line = active_line(server.log_lines())
    dtype = _DTYPES[args.dtype]
    task = progress.add_task("checking with transformers", total=num_steps(answers, dtype))
    standards = build_standards(
        oracle, answers, dtype=dtype, row_format=args.dsv4_kv_format, step=lambda: progress.advance(task)
    )
    progress.stop()

    faults = check_proof(line, facts)
    faults += check_lengths(answers, NEW_TOKENS)
    faults += check_prefix_hits(answers, [request.min_cached_tokens for request in requests])
    for standard in standards:
        faults += judge(standard)
    print_answers(console, answers)
    if line is not None:
        console.print(Text(line))
    if facts is not None:
        print_memory(console, facts)
    print_verdict(console, standards, faults)
    console.print(f"The server's log is {log}.")
    return 1 if faults else 0
