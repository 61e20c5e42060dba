"""``python -m sglang_dsv4 compare``."""

import argparse
import asyncio
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

from sglang_dsv4.check.compare import hit_bytes
from sglang_dsv4.check.compare.ask import make_questions
from sglang_dsv4.check.compare.checkpoint import ready_checkpoint
from sglang_dsv4.check.compare.machine import environment
from sglang_dsv4.check.compare.options import add_server_options, begin, check_model
from sglang_dsv4.check.compare.runs import Passes, Way, read_way
from sglang_dsv4.check.compare.session import Plan, run_session
from sglang_dsv4.check.compare.side import NATIVE_ROWS, OURS, ROUNDED, THEIRS, Side
from sglang_dsv4.check.compare.verdicts import Result, judge_kept, kept_runs
from sglang_dsv4.check.demo.server import ServerDiedError

# Three ways show both modes and all chunk sizes; each is two servers.
WAYS = {"cuda": ("graph-8192", "eager-512", "graph-256"), "cpu": ("eager-8192", "eager-512", "eager-256")}
POOL_TOKENS = {"cuda": 262144, "cpu": 16384}
NUM_EXACT = 32
# SGLang's head gives bf16 logits, 1/32 apart: the two best would often be equal, and rounding there hide the cache's.
FINE = ("--enable-fp32-lm-head",)
# One scheduler that waits must not take a core from another that works.
EXACT = ("--dtype", "float32", "--sleep-on-idle")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``compare``."""
    parser = subparsers.add_parser(
        "compare",
        help="serve a checkpoint with our cache and with SGLang's own, and compare every token",
        description="Serve one checkpoint with our cache and with SGLang's own, in chunks of several sizes, with CUDA graphs "
        "and without, on a cold cache and at prefix hits, and compare greedy tokens and log-probabilities. On a CPU, where "
        "SGLang's own cache does not run, our cache is compared with itself. Exit status 0 only if all is right and every "
        "planted fault was noticed.",
    )
    parser.add_argument("--only", choices=("tokens", "bytes"), help="one part only")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint (default: one is written)")
    parser.add_argument("--requests", type=int, default=200, help="prompts (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=1500, help="tokens of a prompt, at most (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once (default: %(default)s)")
    parser.add_argument(
        "--exact",
        type=int,
        metavar="N",
        help="answers that transformers computes in fp32, to know how far SGLang's own backend is from that (default: 32 on a "
        "GPU; none on a CPU, where both sides round in the same places, and none with --model, which may be too large)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--ways", help="such as graph-8192,eager-512 (default: three that show both and all chunk sizes)")
    parser.add_argument("--rows", help="--dsv4-kv-format of ours (default: SGLang's own on a GPU, fp32 on a CPU)")
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="judge what servers answered before, kept in BUILD_DIR/compare/answers.json, and start none; what follows a token at "
        "which two answers part is then not compared, and no fault is planted",
    )
    parser.add_argument("--at-once", type=int, help="servers that start at the same time (default: all on a GPU, 1 on a CPU)")
    add_server_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Compare; the exit status."""
    console, device = begin(args)
    try:
        check_model(args.model)
        if args.answers is not None and not args.answers.is_file():
            raise ValueError(f"--answers {args.answers}: expected a file, got none")
        kept = kept_runs(args.answers) if args.answers is not None else None
        # Only on a GPU have both backends answered, whatever the device on which they are judged.
        shape = "heads64" if device == "cuda" or kept is not None else "tiny"
        checkpoint = args.model or ready_checkpoint(args.build_dir, shape, console.print)
        if kept is not None:
            runs, where = kept
            count = args.exact
            if count is None:
                count = 0 if args.model else NUM_EXACT
            result = asyncio.run(judge_kept(runs, checkpoint, count, device, console.print))
            return finish(console, args.json, result, {"environment": where})
        plan = None if args.only == "bytes" else make_plan(args, device)
        bytes_side = None if args.only == "tokens" else make_bytes_side(args, device)
        result, facts = run_session(checkpoint, args.build_dir / "compare", device, plan, bytes_side, console.print)
    except (ServerDiedError, OSError, httpx.HTTPError, ValueError) as error:
        console.print(Text(f"FAILED  {type(error).__name__}: {error}", style="bold red"))
        return 1
    return finish(console, args.json, result, {"environment": environment(device), "servers": facts})


def finish(console: Console, file: Path | None, result: Result, about: dict[str, Any]) -> int:
    """Write and print what was found; the exit status."""
    if file is not None:
        file.write_text(json.dumps({**about, **asdict(result)}, indent=1) + "\n", encoding="utf-8")
    show(console, result)
    return 1 if result.faults else 0


def make_side(args: argparse.Namespace, device: str, name: str, way: Way | None, rows: str | None = None) -> Side:
    """One server: a side, in a way."""
    is_ours = name != THEIRS
    fraction, arithmetic = "0.5", EXACT
    if device == "cuda":
        fraction = "0.8"
        arithmetic = ("--cuda-graph-max-bs-decode", str(args.concurrency), *FINE)
    formats = ()
    if is_ours:
        rows = rows or args.rows or (NATIVE_ROWS if device == "cuda" else "fp32")
        formats = ("--dsv4-kv-format", rows, *shlex.split(args.our_options))
    options = (
        "--max-total-tokens",
        str(POOL_TOKENS[device]),
        "--swa-full-tokens-ratio",
        "0.5",
        "--max-running-requests",
        str(2 * args.concurrency),
        "--mem-fraction-static",
        fraction,
        "--grammar-backend",
        "none",
        *arithmetic,
        *formats,
        *shlex.split(args.options),
        *(way.options() if way else ()),
    )
    return Side(f"{name}-{way.name}" if way else name, is_ours, options)


def make_plan(args: argparse.Namespace, device: str) -> Plan:
    """Which servers answer; on a CPU the last way is judged by the others.

    Raises:
        ValueError: an option is out of range.
    """
    if min(args.requests, args.longest, args.concurrency) < 1:
        raise ValueError("expected --requests, --longest and --concurrency of 1 or more")
    ways = [read_way(text) for text in (args.ways.split(",") if args.ways else WAYS[device])]
    if device == "cpu" and len(ways) < 2:
        raise ValueError("--ways: expected two or more on a CPU, where the last is judged by the others")
    rounded = None
    if device == "cpu":
        sides = [make_side(args, device, OURS, way) for way in ways]
        reference, judged = sides[:-1], sides[-1:]
    else:
        reference = [make_side(args, device, THEIRS, way) for way in ways]
        judged = [make_side(args, device, OURS, way) for way in ways]
        if (args.rows or NATIVE_ROWS) != NATIVE_ROWS:
            rounded = make_side(args, device, ROUNDED, ways[0], NATIVE_ROWS)
    questions = make_questions(args.requests, args.longest, args.seed)
    passes = Passes(questions, args.concurrency)
    # The rounded side and the one whose bytes are compared are at most two more.
    at_once = args.at_once or (1 if device == "cpu" else 2 * len(ways) + 2)
    num_exact = args.exact
    if num_exact is None:
        num_exact = 0 if device == "cpu" or args.model else NUM_EXACT
    return Plan(reference, judged, rounded, passes, at_once, num_exact, device)


def make_bytes_side(args: argparse.Namespace, device: str) -> Side:
    """The server whose bytes are compared."""
    side = make_side(args, device, OURS, None)
    return Side(f"{side.name}-bytes", True, (*side.options, *hit_bytes.OPTIONS))


def show(console: Console, result: Result) -> None:
    """Print what was found."""
    if result.bound:
        console.print(
            f"Bound of a log-probability {result.bound['bound']:.3g}: twice the reference's own {result.bound['own_rounding']:.3g}"
            f" or its {result.bound['from_exact']:.3g} from exact arithmetic, and twice {result.bound['row_rounding']:.3g} for"
            f" rows; as a rule {result.bound['typical_bound']:.3g}"
        )
    for name, spread in result.from_exact.items():
        console.print(f"From exact arithmetic, {name}: largest {spread['largest']:.3g}, as a rule {spread['typical']:.3g}")
    for name, reason in result.lost.items():
        console.print(Text(f"Not compared with {name}, which crashed: {reason}", style="bold yellow"))
    for name, own in result.own.items():
        hit, again = own["hit"], own["again"]
        console.print(
            f"{name}, from its own cold run: at hits largest {hit['largest']:.3g}, as a rule {hit['typical']:.3g}; cold again "
            f"largest {again['largest']:.3g}, as a rule {again['typical']:.3g}"
        )
    for name, verdict in result.verdicts.items():
        console.print(f"{name}: {_sentence(verdict)}")
    for planted in result.planted:
        console.print(f"Planted: {planted['fault']}: noticed {planted['noticed']} of {planted['tried']} times")
    if result.bytes is not None:
        console.print(
            f"Bytes: {result.bytes['compared']} comparisons of hits with cold runs, {len(result.bytes['faults'])} differ"
        )
    for fault in result.faults:
        console.print(Text(f"FAULT  {fault}", style="bold red"))
    if not result.faults:
        console.print(Text("PASSED", style="bold green"))


def _sentence(verdict: dict[str, Any]) -> str:
    return (
        f"{verdict['answers']} answers, {verdict['identical']} identical, {verdict['partings']} parted at a close call; "
        f"{verdict['tokens']} tokens, {verdict['certain']} certain, {verdict['uncompared']} not compared behind a parting, "
        f"largest difference {verdict['largest']:.3g}, as a rule {verdict['typical']:.3g}, "
        f"{verdict['num_faults']} faults"
    )
