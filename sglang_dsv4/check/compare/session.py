"""A whole comparison: answers, their bound, the verdict, and planted faults that must be noticed."""

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_dsv4.check.bound import Spread
from sglang_dsv4.check.client import Client
from sglang_dsv4.check.compare import hit_bytes
from sglang_dsv4.check.compare.answers import ANSWERS, Passes, Run, Scorer, ask, write_answers
from sglang_dsv4.check.compare.fleet import Fleet, starting
from sglang_dsv4.check.compare.questions import PLANTED, SHARP_BOUND, wrong_question
from sglang_dsv4.check.compare.result import Result, Runs, Say, find_exact, judge_runs
from sglang_dsv4.check.judge import Verdict, judge
from sglang_dsv4.check.machine import environment
from sglang_dsv4.check.reply import Question, Token
from sglang_dsv4.check.server import Server, ServerDiedError, Side, naming_the_dead

NUM_SCORED = 24
NUM_PLANTED = 4
# The passes of every side that answered, and the two servers that still run: one is asked for scores, the other with planted
# faults.
Asked = tuple[dict[str, list[Run]], Server, Server]


@dataclass(frozen=True)
class Plan:
    """What is compared with what.

    Attributes:
        reference (list[Side]): the backend whose answers count as right, in its own ways; the first is asked for scores.
        judged (list[Side]): the other, in its ways.
        rounded (Side | None): the judged backend with the reference's row format, where its own is another one.
        passes (Passes): the questions.
        at_once (int): servers that start at the same time.
        num_exact (int): answers that are computed exactly, too, to know how far the reference is from that; 0 for none.
        device (str): where that is computed.
    """

    reference: list[Side]
    judged: list[Side]
    rounded: Side | None
    passes: Passes
    at_once: int
    num_exact: int
    device: str = "cpu"

    @property
    def sides(self) -> list[Side]:
        """All of them, in the order in which they start: the one that is asked for scores is first."""
        return [*self.reference, *self.judged, *([self.rounded] if self.rounded else [])]


async def ask_servers(fleet: Fleet, plan: Plan, result: Result, say: Say) -> Asked:
    """Ask every side everything. Servers of SGLang's own cache may crash, all but one; they go to ``result.lost``.

    Raises:
        ServerDiedError: a server of ours crashed, wherever it stands, or all of the reference.
    """
    questions = plan.passes.questions
    found: dict[str, list[Run]] = {}
    anchor: Server | None = None
    last: Server | None = None

    async def ask_one(server: Server) -> None:
        try:
            with naming_the_dead([server]):
                async with Client(server.url) as client:
                    found[server.side.name] = await plan.passes.run(client, server.side.name)
        except ServerDiedError:
            if server.side.is_ours:
                raise
            result.lost[server.side.name] = server.last_error()
            say(f"{server.side.name}: CRASHED, {server.last_error()}")
            return
        answered = [run for runs in found.values() for run in runs]
        write_answers(fleet.folder / ANSWERS, questions, answered, environment(plan.device))
        say(f"{server.side.name}: {len(questions)} questions, cold, hit and again")

    say(starting(len(plan.sides), fleet.folder, plan.device))
    for begin in range(0, len(plan.sides), plan.at_once):
        servers = fleet.start(plan.sides[begin : begin + plan.at_once])
        # At the same time: the first steps of every server compile, and nothing is timed.
        await asyncio.gather(*map(ask_one, servers))
        for server in servers:
            if anchor is None and server.side in plan.reference and server.side.name in found:
                anchor = server
            if server.side == plan.judged[-1]:
                last = server
        fleet.end([server for server in servers if server not in (anchor, last)])
    if anchor is None or last is None:
        raise ServerDiedError(f"reference: expected one server that answers, got {result.lost}")
    return found, anchor, last


async def compare_tokens(fleet: Fleet, checkpoint: Path, plan: Plan, result: Result, say: Say) -> None:
    """Compare greedy tokens and their log-probabilities; findings go to ``result``."""
    questions = plan.passes.questions
    found, anchor, last = await ask_servers(fleet, plan, result, say)
    runs = Runs(
        questions,
        [run for side in plan.reference for run in found.get(side.name, ())],
        [run for side in plan.judged for run in found[side.name]],
        found.get(plan.rounded.name) if plan.rounded else None,
    )
    with naming_the_dead([anchor, last]):
        async with Client(anchor.url) as client, Client(last.url) as judged:
            scorer = Scorer(client, plan.passes.concurrency)
            scored = await _scores(questions, runs.right, scorer)
            exact = Spread()
            if plan.num_exact:
                exact = find_exact(result, runs, checkpoint, plan.num_exact, plan.device, say)
            await judge_runs(result, runs, scored, exact, scorer)
            await _plant(judged, runs, scorer, result)
    fleet.end([anchor, last])


async def compare_bytes(fleet: Fleet, side: Side, lengths: tuple[int, ...], result: Result) -> None:
    """Compare the bytes of hits and cold runs on a server of its own, with `hit_bytes.OPTIONS`."""
    (server,) = fleet.start([side])
    async with Client(server.url) as client:
        result.bytes = await hit_bytes.check_bytes(client, lengths)
    result.faults += result.bytes["faults"][:3]


async def _scores(questions: Sequence[Question], run: Run, scorer: Scorer) -> dict[int, list[Token]]:
    """The reference's scores of its own tokens, for some questions."""
    step = max(1, len(questions) // NUM_SCORED)
    return {
        number: await scorer(questions[number].prompt_ids, run.answers[number].token_ids)
        for number in range(0, len(questions), step)
    }


async def _plant(client: Client, runs: Runs, scorer: Scorer, result: Result) -> None:
    """Answers to prompts with a fault must be noticed: wrong tokens in the window, and a wrong page far behind it."""
    bound, questions, rng = result.bound["bound"], runs.questions, random.Random(0)
    longest = sorted(range(len(questions)), key=lambda i: (questions[i].new_tokens, len(questions[i].prompt_ids)))
    chosen = longest[-NUM_PLANTED:]
    for kind, share in PLANTED.items():
        if kind == "a token of the window" and bound >= SHARP_BOUND:
            continue
        noticed, wanted = 0, math.ceil(share * len(chosen))
        for number in chosen:
            answer = await ask(client, wrong_question(questions[number], kind, rng))
            verdict = Verdict()
            await judge(verdict, kind, questions[number], runs.right.answers[number], answer, bound, scorer)
            noticed += bool(verdict.faults)
        result.planted.append({"fault": kind, "tried": len(chosen), "noticed": noticed, "wanted": wanted})
        if noticed < wanted:
            result.faults.append(
                f"planted fault, {kind}: expected to be noticed {wanted} times of {len(chosen)}, was noticed {noticed} times"
            )


def run_session(
    checkpoint: Path, folder: Path, device: str, plan: Plan | None, bytes_side: Side | None, say: Say
) -> tuple[Result, dict[str, dict[str, Any]]]:
    """Run what was asked for; the result, and what each server says about itself."""
    result = Result()
    with Fleet(checkpoint, folder, device) as fleet:
        if plan is not None:
            if bytes_side is not None and plan.at_once > len(plan.sides):
                fleet.launch([bytes_side])  # ready by the time it is needed
            asyncio.run(compare_tokens(fleet, checkpoint, plan, result, say))
        if bytes_side is not None:
            asyncio.run(compare_bytes(fleet, bytes_side, hit_bytes.LENGTHS[device], result))
        return result, fleet.facts
