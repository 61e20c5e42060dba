"""``bench serve``: SGLang with our cache and with its own, the same requests, taking turns."""

import argparse
import shlex
from pathlib import Path

from rich.console import Console

from sglang_dsv4.check.checkpoint import ready_checkpoint, shaped_spec
from sglang_dsv4.check.command_line import add_server_options, check_arguments, device_of, run_guarded
from sglang_dsv4.check.server import NATIVE_ROWS, OURS, ROUNDED, THEIRS, Side
from sglang_dsv4.tiny.command import read_ratios

NO_PEER = "SGLang's own DeepSeek-V4 cache does not run on a CPU: only ours was measured"
# On a GPU enough for a step to take it longer than the scheduler; with fewer, the host is what is measured.
LAYERS = {"cuda": "0,4,128,4,128,4,128,4,128,4,128,4,128", "cpu": "0,4,128,4,128"}
SMALL_POOLS = ("--max-total-tokens", "16384", "--swa-full-tokens-ratio", "0.5")
CHECK_POOLS = ("--max-total-tokens", "65536", "--swa-full-tokens-ratio", "0.5", "--mem-fraction-static", "0.8")
BOTH = ("--max-running-requests", "64", "--grammar-backend", "none")


def add_parser(what: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``serve`` under ``bench``."""
    parser = what.add_parser(
        "serve",
        help="SGLang with our cache and with its own: throughput and latency, answers checked first",
        description="Start SGLang with our cache and with its own, the same checkpoint and options, and send both the same "
        "requests in turns. The checkpoint has random weights and V4-Flash's widths, and is cut to a few layers and experts.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rounds, medians and where it was measured")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter requests")
    parser.add_argument("--rounds", type=int, help="of each side (default: 9, with --quick or on a CPU 1)")
    parser.add_argument("--only", default="", help="only scenarios whose name contains this text")
    parser.add_argument("--sides", default=f"{OURS},{THEIRS}", help="which to start (default: %(default)s)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint (default: one is written)")
    parser.add_argument(
        "--layers", type=read_ratios, metavar="RATIOS", help="of that, by their ratios (default: thirteen, on a CPU five)"
    )
    parser.add_argument("--rows", help="--dsv4-kv-format of ours (default: the server's)")
    parser.add_argument(
        "--mem-fraction", type=float, default=0.2, help="of free memory, for each side's pools (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="pools of so many tokens, and all servers start at the same time, which saves minutes on a machine where SGLang has "
        "not compiled yet (default: as many tokens as fit into --mem-fraction, and one server after the other)",
    )
    parser.add_argument(
        "--any-core",
        action="store_true",
        help="leave it to the system where threads run (default: the busy ones of both sides have the same cores to themselves, "
        "where there are enough)",
    )
    add_server_options(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status."""
    console = Console(width=160)
    return run_guarded(lambda: _run(args, console), console)


def _run(args: argparse.Namespace, console: Console) -> int:
    # Only here, since `bench kernels` must run where none of the packages that talk to servers are installed.
    from sglang_dsv4.bench.serve_session import Session
    from sglang_dsv4.bench.serve_work import choose_work

    check_arguments(args)
    device = device_of(args)
    chosen = choose_work(args.only, args.quick, device)
    sides, rounded = make_sides(args, device), make_rounded(args, device)
    shape = "flash" if device == "cuda" else "tiny"
    spec = shaped_spec(shape, args.layers or read_ratios(LAYERS[device]))
    checkpoint = args.model or ready_checkpoint(args.build_dir / f"checkpoint-{shape}", spec, console.print)
    session = Session(args, checkpoint, device, console)
    session.report["not_run"] += [NO_PEER] if device == "cpu" else []
    session.run(sides, rounded, chosen)
    return 0


def make_sides(args: argparse.Namespace, device: str) -> list[Side]:
    """The sides in the order in which they take turns.

    Raises:
        ValueError: there is none of that name.
    """
    wanted = args.sides.split(",")
    if set(wanted) - {OURS, THEIRS}:
        raise ValueError(f"--sides: expected some of {OURS},{THEIRS}, got {args.sides}")
    sized = SMALL_POOLS if device == "cpu" else ("--cuda-graph-max-bs-decode", "64")
    both = (*BOTH, *sized, *shlex.split(args.options))
    ours = (*both, *(("--dsv4-kv-format", args.rows) if args.rows else ()), *shlex.split(args.our_options))
    names = [OURS] if device == "cpu" else wanted
    return [Side(name, name == OURS, ours if name == OURS else both) for name in names]


def make_rounded(args: argparse.Namespace, device: str) -> Side | None:
    """Ours with SGLang's row format, where another one is measured: the check needs to know what the format does."""
    if device == "cpu" or args.rows == NATIVE_ROWS or "," not in args.sides:
        return None
    options = (*BOTH, *CHECK_POOLS, "--disable-cuda-graph", *shlex.split(args.options))
    return Side(ROUNDED, True, (*options, "--dsv4-kv-format", NATIVE_ROWS))
