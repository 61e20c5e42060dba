"""One run of `bench serve`: servers start, answers are compared, then the sides take turns."""

import argparse
import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from sglang_dsv4.bench.serve_check import check
from sglang_dsv4.bench.serve_cores import Cores, pin, pin_client, share_out
from sglang_dsv4.bench.serve_report import rows, summarize, table
from sglang_dsv4.bench.serve_start import start_at_once, start_in_turn
from sglang_dsv4.bench.serve_work import Work, chats
from sglang_dsv4.bench.timed_stream import TimedClient
from sglang_dsv4.check.compare.fleet import starting
from sglang_dsv4.check.machine import environment
from sglang_dsv4.check.server import Server, Side, naming_the_dead, wait_until_ready
from sglang_dsv4.check.server_facts import facts_of

ROUNDS = 9


class Session:
    """What one run knows.

    Args:
        args (argparse.Namespace): of the command.
        checkpoint (Path): what is served.
        device (str): ``cpu`` or ``cuda``.
        console (Console): where progress is shown.
    """

    def __init__(self, args: argparse.Namespace, checkpoint: Path, device: str, console: Console) -> None:
        self.args, self.checkpoint, self.device, self.console = args, checkpoint, device, console
        self.folder = args.build_dir / "bench-serve"
        model = json.loads((checkpoint / "config.json").read_text()) | {"weights": "random"}
        self.report: dict[str, Any] = {"environment": environment(device), "model": model, "not_run": [], "rounds": []}

    def run(self, sides: Sequence[Side], rounded: Side | None, chosen: Sequence[Work]) -> None:
        """Start, check, measure; ``report`` has what was found.

        Args:
            sides (Sequence[Side]): in the order in which they take turns.
            rounded (Side | None): a server that takes part in the check alone.
            chosen (Sequence[Work]): what is measured.
        """
        self.console.print(starting(len(sides) + bool(rounded), self.folder, self.device))
        with self._checked_servers(sides, rounded) as servers:
            cores = None if self.args.any_core else share_out(os.sched_getaffinity(0))
            self.report["cores"] = self._bind(servers, cores)
            with naming_the_dead(servers):
                asyncio.run(self._measure(servers, chosen))
        self._show()

    @contextmanager
    def _checked_servers(self, sides: Sequence[Side], rounded: Side | None) -> Iterator[list[Server]]:
        """The servers of the sides, once their answers were compared; the third one has ended by then."""
        with ExitStack() as stack, ExitStack() as short:

            def enter(side: Side) -> Server:
                owner = short if side is rounded else stack
                return owner.enter_context(Server(side, self.checkpoint, self.folder, self.device))

            third: list[Server] = []
            if self.args.tokens:
                third = [enter(rounded)] if rounded else []
                servers = start_at_once(sides, self.args.tokens, enter)
            else:
                servers = start_in_turn(sides, self.args.mem_fraction if self.device == "cuda" else 0.5, self.device, enter)
                third = [enter(rounded)] if rounded else []
            wait_until_ready(third)
            self.report["servers"] = {server.side.name: facts_of(server) for server in servers}
            urls = {server.side.name: server.url for server in (*servers, *third)}
            # A checkpoint of one's own may be too large for the CPU.
            written = None if self.args.model else self.checkpoint
            with naming_the_dead([*servers, *third]):
                answers = self.folder / "answers.json"
                checked = asyncio.run(check(urls, written, answers, self.device, self.console.print))
            self.report["check"] = checked
            self.console.print(f"Checked: {checked['bound']}, {checked['verdicts']}")
            short.close()
            yield servers

    def _bind(self, servers: Sequence[Server], cores: Cores | None) -> dict[str, Any] | None:
        """Give both sides the same cores, and this program one; for the report."""
        if cores is None:
            self.console.print("Not bound to cores")
            return None
        for server in servers:
            pin(server, cores)
        pin_client(cores)
        self.console.print(
            f"Bound: schedulers to CPU {cores.scheduler}, detokenizers to {cores.detokenizer}, servers to {cores.server}, this "
            f"program to {cores.client}, their other threads to {len(cores.others)} more"
        )
        return cores._asdict()

    async def _measure(self, servers: Sequence[Server], chosen: Sequence[Work]) -> None:
        """Let the sides take turns, the others paused; the report is written after every round."""
        count = self.args.rounds or (1 if self.args.quick or self.device == "cpu" else ROUNDS)
        async with AsyncExitStack() as stack:
            clients = {s.side.name: await stack.enter_async_context(TimedClient(s.url)) for s in servers}
            for work in chosen:
                for client in clients.values():  # compiles what this scenario needs
                    await send_round(client, work if self.device == "cuda" else chats(1, 1, 16, 2))
                for number in range(count):
                    # Who is first takes turns, too.
                    for name, client in list(clients.items())[:: (-1) ** number]:
                        with ExitStack() as others:
                            for server in servers:
                                if server.side.name != name:
                                    others.enter_context(server.paused())
                            numbers = await send_round(client, work)
                        self._keep(work, name, number, numbers)

    def _keep(self, work: Work, side: str, number: int, numbers: dict[str, Any]) -> None:
        entry = {"work": work.name, "about": work.about, "side": side, "round": number, "numbers": numbers}
        self.report["rounds"].append(entry)
        self.console.print(
            f"{work.name:14} {side:8} {numbers['output_tokens_per_s']:9.1f} new tokens/s, "
            f"TTFT {numbers['ttft_p50_ms']:.1f} ms, ITL {numbers['itl_p50_ms']:.2f} ms"
        )
        self.report["rows"] = rows(self.report["rounds"])
        if self.args.json:
            self.args.json.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def _show(self) -> None:
        self.console.print(table(self.report["rows"]))
        for name, facts in self.report["servers"].items():
            bytes_per_token = facts["sizing_bytes_per_token"] or "given"
            self.console.print(f"{name}: {facts['tokens_that_fit']:,} tokens fit, {bytes_per_token} bytes a token")
        for reason in self.report["not_run"]:
            self.console.print(f"Not run: {reason}")


async def send_round(client: TimedClient, work: Work) -> dict[str, Any]:
    """All of some work on an empty prefix cache; the round's numbers."""
    await client.flush()
    return summarize([stream.reply() for stream in await work.send(client)])
