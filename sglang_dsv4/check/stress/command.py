"""``python -m sglang_dsv4 stress``."""

import argparse
import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from sglang_dsv4.check.demo.client import Client
from sglang_dsv4.check.demo.server import Server, ServerDiedError, leave
from sglang_dsv4.check.demo.start import ready_checkpoint, steps_progress, wait_until_healthy
from sglang_dsv4.check.stress.drive import Load
from sglang_dsv4.check.stress.memory import group_bytes
from sglang_dsv4.check.stress.report import draw_run, print_run
from sglang_dsv4.check.stress.session import stress_runtime, stress_server
from sglang_dsv4.check.stress.summary import Run
from sglang_dsv4.tiny.tokenizer import VOCAB_SIZE

REQUESTS = 200
# Pages enough to keep prefixes, and few enough that a burst outgrows them and requests are sent back to the queue in the
# middle; and exact rows, so that one wrong entry among many shows. SGLang gives up prefixes to have a page free for each
# request that runs, before every step; so a pool of twice as many pages as requests keeps next to nothing.
TINY_SERVER = (
    "--dtype",
    "float32",
    "--dsv4-kv-format",
    "fp32",
    "--max-total-tokens",
    "15360",
    "--swa-full-tokens-ratio",
    "0.9",
    "--max-running-requests",
    "40",
    "--schedule-conservativeness",
    "0.01",
    "--enable-cache-report",
)
RUNTIME_PAGES = 64


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``stress``."""
    parser = subparsers.add_parser(
        "stress",
        help="send a server many requests at once and check every answer",
        description="Send many mixed requests at once, and compare every answer with the same request alone on a cold "
        "cache. The server's cache is emptied for that, so nobody else may use it meanwhile. Exit status 0 only if all "
        "is right.",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("url", nargs="?", help="a running server, such as http://127.0.0.1:30000")
    target.add_argument("--tiny", action="store_true", help="start a server with a tiny checkpoint on the CPU")
    target.add_argument("--runtime", type=Path, metavar="CHECKPOINT", help="the in-process runtime instead")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--requests", type=int, default=REQUESTS, help="how many (default: %(default)s)")
    amount.add_argument("--minutes", type=float, help="instead: for how long requests start")
    for name, default, text in (
        ("--concurrency", 16, "requests in flight"),
        ("--seed", 0, "of the requests"),
        ("--first", 0, "number of the first request"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--bound",
        type=float,
        help="largest difference of log-probabilities between two right runs (default: measured with transformers where "
        "the checkpoint is a folder of this machine and served in float32 on a CPU; else by the server itself, which "
        "reads again in one prefill what it has decoded)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw throughput and pool use")
    parser.add_argument(
        "--build-dir",
        type=Path,
        default=Path("build"),
        help="for the tiny checkpoint and the server's log (default: %(default)s)",
    )
    parser.set_defaults(func=run)


class Interrupt:
    """What Ctrl-C does: the first ends the load, and what came is judged; the second ends all."""

    def __init__(self, console: Console) -> None:
        self.is_set = False
        self._console = console
        signal.signal(signal.SIGINT, self._note)

    def _note(self, *_: object) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        self._console.print("No more requests; what came is compared. Ctrl-C again stops at once.")


def run(args: argparse.Namespace) -> int:
    """Run the stress test; the exit status."""
    signal.signal(signal.SIGTERM, leave)
    console = Console()
    interrupt = Interrupt(console)
    if (args.requests or 1) < 1 or args.concurrency < 1:
        raise SystemExit(f"expected --requests and --concurrency of 1 or more, got {args.requests} and {args.concurrency}")
    requests = None if args.minutes is not None else args.requests
    load = Load(args.seed, args.first, requests, args.minutes or 0.0, args.concurrency)
    try:
        with steps_progress(console) as progress:
            result = _stress(args, load, progress, lambda: interrupt.is_set)
    except (ServerDiedError, TimeoutError, httpx.HTTPError, ValueError, OSError) as error:
        where = f"{args.url}: " if args.url else ""
        console.print(Text(f"FAILED  {where}{type(error).__name__}: {error}", style="bold red"))
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 128 + signal.SIGINT
    print_run(console, result)
    if args.json is not None:
        args.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw_run(result, args.plot)
    return 1 if result.faults else 0


def _stress(args: argparse.Namespace, load: Load, progress: Progress, is_stopped: Callable[[], bool]) -> Run:
    if args.runtime is not None:
        return asyncio.run(stress_runtime(args.runtime, load, progress, RUNTIME_PAGES, is_stopped))
    if not args.tiny:
        return asyncio.run(
            stress_server(args.url, load, progress, target=args.url, bound=args.bound, memory_bytes=None, is_stopped=is_stopped)
        )
    checkpoint = ready_checkpoint(args.build_dir / "tiny", progress)
    with Server(checkpoint, args.build_dir / "stress-server.log", TINY_SERVER) as server:
        client = Client(server.url, VOCAB_SIZE)
        wait_until_healthy(server, client, progress)
        client.close()
        try:
            result = asyncio.run(
                stress_server(
                    server.url,
                    load,
                    progress,
                    target="--tiny",
                    bound=args.bound,
                    memory_bytes=lambda: group_bytes(server.group),
                    is_stopped=is_stopped,
                )
            )
        except (ConnectionError, httpx.TransportError):
            server.check_alive()  # its log says why
            raise
        server.check_alive()
        return result
