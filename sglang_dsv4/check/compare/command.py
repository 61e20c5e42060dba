"""``python -m sglang_dsv4 compare``."""

import argparse
import asyncio
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dsv4_kernels.layout import ROW_FORMATS
from sglang_dsv4.check.checkpoint import ready_checkpoint, shaped_spec
from sglang_dsv4.check.command_line import add_server_options, check_arguments, device_of, run_guarded
from sglang_dsv4.check.compare import hit_bytes
from sglang_dsv4.check.compare.answers import Passes
from sglang_dsv4.check.compare.fleet import Way, read_way
from sglang_dsv4.check.compare.questions import make_questions
from sglang_dsv4.check.compare.result import Result, judge_kept, kept_runs
from sglang_dsv4.check.compare.session import Plan, run_session
from sglang_dsv4.check.machine import environment
from sglang_dsv4.check.server import NATIVE_ROWS, OURS, ROUNDED, THEIRS, Side

# Three ways show both modes and all chunk sizes; each is two servers.
WAYS = {"cuda": ("graph-8192", "eager-512", "graph-256"), "cpu": ("eager-8192", "eager-512", "eager-256")}
POOL_TOKENS = {"cuda": 262144, "cpu": 16384}
NUM_EXACT = 32
# SGLang's head gives bf16 logits, 1/32 apart: the two best would often be equal, and rounding there would hide the cache's.
FINE = ("--enable-fp32-lm-head",)
# A scheduler that waits must not take a core from one that works.
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
    numbers = {"requests": (200, "prompts"), "longest": (1500, "tokens of a prompt, at most"), "seed": (0, "of the prompts")}
    for name, (default, text) in (numbers | {"concurrency": (16, "requests at once")}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--exact",
        type=int,
        metavar="N",
        help="answers that transformers computes in fp32, to know how far SGLang's own backend is from that (default: 32 on a "
        "GPU; none on a CPU, where both sides round in the same places, and none with --model, which may be too large)",
    )
    parser.add_argument("--ways", help="such as graph-8192,eager-512 (default: three that show both and all chunk sizes)")
    parser.add_argument(
        "--rows", choices=sorted(ROW_FORMATS), help="--dsv4-kv-format of ours (default: SGLang's own on a GPU, fp32 on a CPU)"
    )
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="judge earlier answers of servers, kept in BUILD_DIR/compare/answers.json, and start none; nothing is compared behind "
        "a token at which two answers part, and no fault is planted",
    )
    parser.add_argument("--at-once", type=int, help="servers that start at the same time (default: all on a GPU, 1 on a CPU)")
    add_server_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Compare; the exit status."""
    console = Console(width=160)
    return run_guarded(lambda: _compare(args, console), console)


def _compare(args: argparse.Namespace, console: Console) -> int:
    check_arguments(args)
    device = device_of(args)
    kept = kept_runs(args.answers) if args.answers else None
    plan = None if args.only == "bytes" else make_plan(args, device)
    bytes_side = None if args.only == "tokens" else make_bytes_side(args, device)
    # Only on a GPU have both backends answered, whatever the device on which they are judged.
    shape = "heads64" if device == "cuda" or kept is not None else "tiny"
    path = args.build_dir / f"checkpoint-{shape}"
    checkpoint = args.model or ready_checkpoint(path, shaped_spec(shape), console.print)
    if kept is not None:
        runs, where = kept
        result = asyncio.run(judge_kept(runs, checkpoint, num_exact(args, is_cpu=False), device, console.print))
        return finish(console, args.json, result, {"environment": where})
    result, facts = run_session(checkpoint, args.build_dir / "compare", device, plan, bytes_side, console.print)
    return finish(console, args.json, result, {"environment": environment(device), "servers": facts})


def finish(console: Console, file: Path | None, result: Result, about: dict[str, Any]) -> int:
    """Write and print what was found; the exit status."""
    if file is not None:
        file.write_text(json.dumps({**about, **asdict(result)}, indent=1) + "\n", encoding="utf-8")
    show(console, result)
    return 1 if result.faults else 0


def make_side(args: argparse.Namespace, device: str, name: str, way: Way | None, rows: str | None = None) -> Side:
    """One server: a side, in a way."""
    on_gpu, is_ours = device == "cuda", name != THEIRS
    fraction, arithmetic = ("0.8", ("--cuda-graph-max-bs-decode", str(args.concurrency), *FINE)) if on_gpu else ("0.5", EXACT)
    rows = rows or args.rows or (NATIVE_ROWS if on_gpu else "fp32")
    formats = ("--dsv4-kv-format", rows, *shlex.split(args.our_options)) if is_ours else ()
    options = (
        *("--max-total-tokens", str(POOL_TOKENS[device]), "--swa-full-tokens-ratio", "0.5"),
        *("--max-running-requests", str(2 * args.concurrency), "--mem-fraction-static", fraction),
        *("--grammar-backend", "none", *arithmetic, *formats, *shlex.split(args.options), *(way.options() if way else ())),
    )
    return Side(f"{name}-{way.name}" if way else name, is_ours, options)


def make_plan(args: argparse.Namespace, device: str) -> Plan:
    """Which servers answer; on a CPU the last way is judged by the others.

    Raises:
        ValueError: a way is unknown, or on a CPU the only one.
    """
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
    passes = Passes(make_questions(args.requests, args.longest, args.seed), args.concurrency)
    # At most two more: the rounded side, and the one whose bytes are compared.
    at_once = args.at_once or (1 if device == "cpu" else 2 * len(ways) + 2)
    return Plan(reference, judged, rounded, passes, at_once, num_exact(args, is_cpu=device == "cpu"), device)


def num_exact(args: argparse.Namespace, *, is_cpu: bool) -> int:
    """How many answers transformers computes: as asked, or none of a user's checkpoint and where both sides round alike."""
    if args.exact is not None:
        return int(args.exact)
    return 0 if is_cpu or args.model else NUM_EXACT


def make_bytes_side(args: argparse.Namespace, device: str) -> Side:
    """The server whose bytes are compared."""
    side = make_side(args, device, OURS, None)
    return Side(f"{side.name}-bytes", True, (*side.options, *hit_bytes.OPTIONS))


def show(console: Console, result: Result) -> None:
    """Print what was found."""
    if bound := result.bound:
        console.print(
            f"A log-probability may differ by {bound['bound']:.3g} (typically by {bound['typical_bound']:.3g}): twice the larger of "
            f"the reference's own rounding, {bound['own_rounding']:.3g}, and its distance from exact arithmetic, "
            f"{bound['from_exact']:.3g}, plus twice what the row format does, {bound['row_rounding']:.3g}"
        )
    for name, spread in result.from_exact.items():
        console.print(f"Distance from exact arithmetic, {name}: {_spread(spread)}")
    for name, reason in result.lost.items():
        console.print(Text(f"Not compared with {name}, which crashed: {reason}", style="bold yellow"))
    for name, own in result.own.items():
        console.print(f"{name}, from its own cold run: at hits {_spread(own['hit'])}; cold again {_spread(own['again'])}")
    for name, verdict in result.verdicts.items():
        console.print(f"{name}: {_sentence(verdict)}")
    for planted in result.planted:
        console.print(f"Control, {planted['fault']} changed: noticed {planted['noticed']} of {planted['tried']} times")
    if result.bytes is not None:
        count, wrong = result.bytes["compared"], len(result.bytes["faults"])
        console.print(f"Bytes: hits compared with cold runs {count} times, {wrong} differ")
    for fault in result.faults:
        console.print(Text(f"FAULT  {fault}", style="bold red"))
    if not result.faults:
        console.print(Text("PASSED", style="bold green"))


def _spread(spread: dict[str, float]) -> str:
    return f"largest {spread['largest']:.3g}, typical {spread['typical']:.3g}"


def _sentence(verdict: dict[str, Any]) -> str:
    return (
        f"{verdict['answers']} answers, {verdict['identical']} identical, {verdict['partings']} diverged at a near-tie; "
        f"{verdict['tokens']} tokens compared, {verdict['certain']} certain, {verdict['uncompared']} not compared after a "
        f"divergence; {_spread(verdict)}; {verdict['num_faults']} faults"
    )
