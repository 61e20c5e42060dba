"""``bench serve``: SGLang with our cache and with its own, the same requests, taking turns."""

import argparse
import asyncio
import json
import os
import shlex
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from sglang_dsv4.bench.serve_check import check
from sglang_dsv4.bench.serve_cores import Cores, pin, pin_client, share_out
from sglang_dsv4.bench.serve_report import rows, summarize, table
from sglang_dsv4.bench.serve_start import start_at_once, start_in_turn
from sglang_dsv4.bench.serve_work import Work, all_work, chats
from sglang_dsv4.bench.timed_stream import TimedClient
from sglang_dsv4.check.checkpoint import ready_checkpoint, shaped_spec
from sglang_dsv4.check.command_line import add_server_options, check_arguments, device_of, run_guarded
from sglang_dsv4.check.compare.fleet import starting
from sglang_dsv4.check.machine import environment
from sglang_dsv4.check.server import NATIVE_ROWS, OURS, ROUNDED, THEIRS, Server, Side, naming_the_dead, wait_until_ready
from sglang_dsv4.check.server_facts import facts_of
from sglang_dsv4.tiny.command import read_ratios

NO_PEER = "SGLang 0.5.17's own DeepSeek-V4 cache does not run on a CPU: ours alone was measured"
# Questions of the check, and tokens of the longest.
CHECKED = {"cuda": (24, 1024), "cpu": (4, 300)}
# On a GPU so many that a step takes it longer than the scheduler: with fewer, what is measured is the host.
LAYERS = {"cuda": "0,4,128,4,128,4,128,4,128,4,128,4,128", "cpu": "0,4,128,4,128"}
ROUNDS = 9


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
    parser.add_argument("--rounds", type=int, help=f"of each side (default: {ROUNDS}, with --quick or on a CPU 1)")
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
    check_arguments(args)
    device = device_of(args)
    shape = "flash" if device == "cuda" else "tiny"
    chosen = chosen_work(args, device)
    sides, rounded = make_sides(args, device), make_rounded(args, device)
    checkpoint = args.model or ready_checkpoint(
        args.build_dir / f"checkpoint-{shape}", shaped_spec(shape, args.layers or read_ratios(LAYERS[device])), console.print
    )
    model = json.loads((checkpoint / "config.json").read_text()) | {"weights": "random"}
    report: dict[str, Any] = {
        "environment": environment(device),
        "model": model,
        "not_run": [NO_PEER] if device == "cpu" else [],
        "rounds": [],
    }
    with ExitStack() as stack:
        folder = args.build_dir / "bench-serve"
        console.print(starting(len(sides) + bool(rounded), folder, device))

        def enter(side: Side, owner: ExitStack = stack) -> Server:
            return owner.enter_context(Server(side, checkpoint, folder, device))

        with ExitStack() as short:
            third = None
            if args.tokens:
                third = rounded and enter(rounded, short)
                servers = start_at_once(sides, args.tokens, enter)
            else:
                share = args.mem_fraction if device == "cuda" else 0.5
                servers = start_in_turn(sides, share, device, enter)
                third = rounded and enter(rounded, short)
            report["servers"] = {server.side.name: facts_of(server) for server in servers}
            urls = {server.side.name: server.url for server in servers}
            if third is not None:
                wait_until_ready([third])
                urls[third.side.name] = third.url
            # A checkpoint of one's own may be too large for the CPU.
            written = None if args.model else checkpoint
            answers = folder / "answers.json"
            with naming_the_dead([*servers, *([third] if third else [])]):
                report["check"] = asyncio.run(check(urls, *CHECKED[device], written, answers, device))
        console.print(f"Checked: {report['check']}")
        cores = None if args.any_core else share_out(os.sched_getaffinity(0))
        report["cores"] = bind(servers, cores, console)
        with naming_the_dead(servers):
            asyncio.run(_measure(args, chosen, device, servers, report, console))
    console.print(table(report["rows"]))
    for name, facts in report["servers"].items():
        console.print(
            f"{name}: {facts['tokens_that_fit']:,} tokens fit, {facts['sizing_bytes_per_token'] or 'given'} bytes a token"
        )
    for reason in report["not_run"]:
        console.print(f"Not run: {reason}")
    return 0


def bind(servers: list[Server], cores: Cores | None, console: Console) -> dict[str, Any] | None:
    """Give both sides the same cores, and this program one; for the report."""
    if cores is None:
        console.print("Not bound to cores")
        return None
    for server in servers:
        pin(server, cores)
    pin_client(cores)
    console.print(
        f"Bound: schedulers to CPU {cores.scheduler}, detokenizers to {cores.detokenizer}, servers to {cores.server}, this "
        f"program to {cores.client}, their other threads to {len(cores.others)} more"
    )
    return cores._asdict()


def chosen_work(args: argparse.Namespace, device: str) -> list[Work]:
    """The scenarios to measure.

    Raises:
        ValueError: there is none of that name, or no round of any.
    """
    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"--rounds: expected 1 or more, got {args.rounds}")
    found = all_work(args.quick or device == "cpu", device)
    chosen = [work for work in found if args.only in work.name]
    if not chosen:
        names = ", ".join(work.name for work in found)
        raise ValueError(f"--only {args.only}: expected a part of one of {names}")
    return chosen


def make_sides(args: argparse.Namespace, device: str) -> list[Side]:
    """The sides in the order in which they take turns.

    Raises:
        ValueError: there is none of that name.
    """
    wanted = args.sides.split(",")
    if set(wanted) - {OURS, THEIRS}:
        raise ValueError(f"--sides: expected some of {OURS},{THEIRS}, got {args.sides}")
    if device == "cpu":
        wanted = [OURS]
    small = ("--max-total-tokens", "16384", "--swa-full-tokens-ratio", "0.5")
    common = (
        "--max-running-requests",
        "64",
        "--grammar-backend",
        "none",
        *(small if device == "cpu" else ("--cuda-graph-max-bs-decode", "64")),
        *shlex.split(args.options),
    )
    rows_option = ("--dsv4-kv-format", args.rows) if args.rows else ()
    ours = (*common, *rows_option, *shlex.split(args.our_options))
    return [Side(name, name == OURS, ours if name == OURS else common) for name in wanted]


def make_rounded(args: argparse.Namespace, device: str) -> Side | None:
    """Ours with SGLang's row format, where that is not the one measured: the check needs to know what the format does."""
    wanted = args.sides.split(",")
    if device == "cpu" or args.rows == NATIVE_ROWS or len(wanted) < 2:
        return None
    options = (
        "--max-total-tokens",
        "65536",
        "--swa-full-tokens-ratio",
        "0.5",
        "--mem-fraction-static",
        "0.8",
        "--max-running-requests",
        "64",
        "--grammar-backend",
        "none",
        "--disable-cuda-graph",
        *shlex.split(args.options),
    )
    return Side(ROUNDED, True, (*options, "--dsv4-kv-format", NATIVE_ROWS))


async def _measure(
    args: argparse.Namespace, chosen: list[Work], device: str, servers: list[Server], report: dict[str, Any], console: Console
) -> None:
    """Let the sides take turns, the others paused; the report is written after every round."""
    async with AsyncExitStack() as stack:
        clients = {s.side.name: await stack.enter_async_context(TimedClient(s.url)) for s in servers}
        await _take_turns(args, chosen, device, servers, clients, report, console)


async def _take_turns(
    args: argparse.Namespace,
    chosen: list[Work],
    device: str,
    servers: list[Server],
    clients: dict[str, TimedClient],
    report: dict[str, Any],
    console: Console,
) -> None:
    quick = args.quick or device == "cpu"
    for work in chosen:
        for client in clients.values():  # compiles what this scenario needs
            await _round(client, work if device == "cuda" else chats(1, 1, 16, 2))
        for number in range(args.rounds or (1 if quick else ROUNDS)):
            # Who is first takes turns, too.
            for name, client in list(clients.items())[:: (-1) ** number]:
                with ExitStack() as others:
                    for server in servers:
                        if server.side.name != name:
                            others.enter_context(server.paused())
                    numbers = await _round(client, work)
                entry = {"work": work.name, "about": work.about, "side": name, "round": number}
                report["rounds"].append({**entry, "numbers": numbers})
                console.print(
                    f"{work.name:14} {name:8} {numbers['output_tokens_per_s']:9.1f} new tokens/s, "
                    f"TTFT {numbers['ttft_p50_ms']:.1f} ms, ITL {numbers['itl_p50_ms']:.2f} ms"
                )
                report["rows"] = rows(report["rounds"])
                if args.json:
                    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


async def _round(client: TimedClient, work: Work) -> dict[str, Any]:
    await client.flush()
    return summarize([stream.reply() for stream in await work.send(client)])
