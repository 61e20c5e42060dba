"""``python -m sglang_dsv4 stress``."""

import argparse
import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from sglang_dsv4.check.checkpoint import ready_checkpoint
from sglang_dsv4.check.command_line import add_build_dir, check_arguments, run_guarded, started, steps_progress
from sglang_dsv4.check.server import Server, Side, group_bytes, naming_the_dead
from sglang_dsv4.check.stress.load import Load
from sglang_dsv4.check.stress.report import draw_run, print_run
from sglang_dsv4.check.stress.runtime_target import RuntimeTarget
from sglang_dsv4.check.stress.server_target import ServerTarget
from sglang_dsv4.check.stress.session import Target, stress
from sglang_dsv4.tiny import TinySpec

REQUESTS = 200
# Enough pages to keep prefixes, and few enough that a burst outgrows them and requests are sent back to the queue half way;
# and exact rows, so that one wrong entry among many shows. Before every step SGLang gives up prefixes to have a page free for
# each running request; so a pool of twice as many pages as requests keeps next to nothing.
TINY_SERVER = (
    *("--dtype", "float32", "--dsv4-kv-format", "fp32", "--max-total-tokens", "15360", "--swa-full-tokens-ratio", "0.9"),
    *("--max-running-requests", "40", "--schedule-conservativeness", "0.01", "--mem-fraction-static", "0.5"),
    "--enable-cache-report",
)
RUNTIME_PAGES = 64


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``stress``."""
    parser = subparsers.add_parser(
        "stress",
        help="send a server many requests at once and check every answer",
        description="Send many mixed requests at once, and compare every answer with the same request alone on a cold "
        "cache. That empties the server's cache again and again, so nobody else may use it meanwhile. Exit status 0 only if "
        "all is right.",
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
        "scores in one prefill what it has decoded)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw throughput and pool use")
    add_build_dir(parser)
    parser.set_defaults(func=run)


class Interrupt:
    """What Ctrl-C does: during the load the first ends it, and what came back is judged; any other ends the command."""

    def __init__(self, console: Console) -> None:
        self._is_set = self._is_loading = False
        self._console = console
        signal.signal(signal.SIGINT, self._note)

    def __call__(self) -> bool:
        """Whether the load must end; the load asks before every request."""
        self._is_loading = True
        return self._is_set

    def _note(self, *_: object) -> None:
        if self._is_set or not self._is_loading:
            raise KeyboardInterrupt
        self._is_set = True
        self._console.print("No more requests; the answers so far are compared. Ctrl-C again stops at once.")


def run(args: argparse.Namespace) -> int:
    """Run the stress test; the exit status."""
    console = Console()
    return run_guarded(lambda: _stress(args, console), console, f"{args.url}: " if args.url else "")


def _stress(args: argparse.Namespace, console: Console) -> int:
    check_arguments(args)
    requests = None if args.minutes is not None else args.requests
    load = Load(args.seed, args.first, requests, args.minutes or 0.0, args.concurrency)
    interrupt = Interrupt(console)
    with steps_progress(console) as progress, _target(args, progress) as target:
        result = asyncio.run(stress(target, load, progress, bound=args.bound, is_stopped=interrupt))
    print_run(console, result)
    if args.json is not None:
        args.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw_run(result, args.plot)
    return 1 if result.faults else 0


@contextmanager
def _target(args: argparse.Namespace, progress: Progress) -> Iterator[Target]:
    """A runtime in this process, a server that runs already, or one that is started for the block."""
    if args.runtime is not None:
        yield RuntimeTarget(args.runtime, RUNTIME_PAGES, max_requests=args.concurrency)
    elif args.url is not None:
        yield ServerTarget(args.url, args.url)
    else:
        checkpoint = ready_checkpoint(args.build_dir / "tiny", TinySpec())
        with started(Server(Side("stress-server", True, TINY_SERVER), checkpoint, args.build_dir), progress) as server:
            with naming_the_dead([server]):
                yield ServerTarget(server.url, "--tiny", lambda: group_bytes(server.group))
            server.check_alive()
