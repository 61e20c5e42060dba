"""A whole comparison: answers, their bound, the verdict, and faults that must be noticed."""

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_dsv4.check.compare import hit_bytes
from sglang_dsv4.check.compare.ask import Question, Scorer, Token, ask_all
from sglang_dsv4.check.compare.client import ServeClient
from sglang_dsv4.check.compare.judge import Spread, Verdict, judge
from sglang_dsv4.check.compare.machine import environment
from sglang_dsv4.check.compare.prompts import random_ids
from sglang_dsv4.check.compare.runs import ANSWERS, Fleet, Passes, Run, write_answers
from sglang_dsv4.check.compare.side import Side, SideServer, naming_the_dead, starting
from sglang_dsv4.check.compare.verdicts import Result, Runs, Say, find_exact, judge_runs
from sglang_dsv4.check.demo.server import ServerDiedError

NUM_SCORED = 24
NUM_PLANTED = 4
# Faults that are planted, and what share of them must be noticed.
PLANTED = {"the first page": 1.0, "most of the window": 1.0, "a token of the window": 0.5}
# One token moves an answer by about 1, as bf16 and fp8 rows may; it is planted only where rounding is much less.
SHARP_BOUND = 0.1


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


@dataclass(frozen=True)
class Asked:
    """What servers answered, by side, and the two that still run.

    Attributes:
        found (dict[str, list[Run]]): the passes of every side that answered.
        anchor (SideServer): of the reference; it is asked for scores.
        last (SideServer): of what is judged; it is asked with planted faults.
    """

    found: dict[str, list[Run]]
    anchor: SideServer
    last: SideServer


async def ask_servers(fleet: Fleet, plan: Plan, result: Result, say: Say) -> Asked:
    """Ask every side everything; servers of SGLang's own cache may crash, but one, which goes to ``result.lost``.

    Raises:
        ServerDiedError: a server of ours crashed, wherever it stands, or all of the reference.
    """
    questions = plan.passes.questions
    found: dict[str, list[Run]] = {}
    anchor: SideServer | None = None
    last: SideServer | None = None

    async def ask(server: SideServer) -> None:
        try:
            found[server.side.name] = await _ask(server, plan.passes)
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
        await asyncio.gather(*map(ask, servers))
        for server in servers:
            if anchor is None and server.side in plan.reference and server.side.name in found:
                anchor = server
            if server.side == plan.judged[-1]:
                last = server
        fleet.end([server for server in servers if server not in (anchor, last)])
    if anchor is None or last is None:
        raise ServerDiedError(f"reference: expected one server that answers, got {result.lost}")
    return Asked(found, anchor, last)


async def compare_tokens(fleet: Fleet, checkpoint: Path, plan: Plan, result: Result, say: Say) -> None:
    """Compare greedy tokens and their log-probabilities; findings go to ``result``."""
    questions = plan.passes.questions
    asked = await ask_servers(fleet, plan, result, say)
    found, anchor, last = asked.found, asked.anchor, asked.last
    client = ServeClient(anchor.url)
    scorer = Scorer(client, plan.passes.concurrency)
    runs = Runs(
        questions,
        [run for side in plan.reference for run in found.get(side.name, ())],
        [run for side in plan.judged for run in found[side.name]],
        found.get(plan.rounded.name) if plan.rounded else None,
    )
    with naming_the_dead([anchor, last]):
        scored = await _scores(questions, runs.right, scorer)
        exact = Spread()
        if plan.num_exact:
            exact = find_exact(result, runs, checkpoint, plan.num_exact, plan.device, say)
        await judge_runs(result, runs, scored, exact, scorer)
        await _plant(last, questions, runs.right, result.bound["bound"], scorer, result)
    await client.close()
    fleet.end([anchor, last])


async def compare_bytes(fleet: Fleet, side: Side, lengths: tuple[int, ...], result: Result) -> None:
    """Compare the bytes of hits and cold runs on a server of its own, with `hit_bytes.OPTIONS`."""
    (server,) = fleet.start([side])
    client = ServeClient(server.url)
    result.bytes = await hit_bytes.check_bytes(client, lengths)
    result.faults += result.bytes["faults"][:3]
    await client.close()


async def _ask(server: SideServer, passes: Passes) -> list[Run]:
    client = ServeClient(server.url)
    try:
        with naming_the_dead([server]):
            return await passes.run(client, server.side.name)
    finally:
        await client.close()


async def _scores(questions: Sequence[Question], run: Run, scorer: Any) -> dict[int, list[Token]]:
    """The reference's scores of its own tokens, for some questions."""
    step = max(1, len(questions) // NUM_SCORED)
    return {
        number: await scorer(questions[number].prompt_ids, run.answers[number].token_ids)
        for number in range(0, len(questions), step)
    }


async def _plant(
    server: SideServer, questions: Sequence[Question], reference: Run, bound: float, scorer: Any, result: Result
) -> None:
    """Answers to prompts with a fault must be noticed: wrong tokens in the window, and a wrong page far behind it."""
    most = sorted(range(len(questions)), key=lambda number: (questions[number].new_tokens, len(questions[number].prompt_ids)))
    chosen = most[-NUM_PLANTED:]
    client, rng = ServeClient(server.url), random.Random(0)
    kinds = [kind for kind in PLANTED if kind != "a token of the window" or bound < SHARP_BOUND]
    for kind in kinds:
        share = PLANTED[kind]
        noticed, wanted = 0, math.ceil(share * len(chosen))
        for number in chosen:
            question = questions[number]
            wrong = wrong_question(question, kind, rng)
            (answer,) = await ask_all(client, [wrong], 1, [0])
            verdict = Verdict()
            await judge(verdict, kind, question, reference.answers[number], answer, bound, scorer)
            noticed += bool(verdict.faults)
        found = {"fault": kind, "tried": len(chosen), "noticed": noticed, "wanted": wanted}
        result.planted.append(found)
        if noticed < wanted:
            result.faults.append(
                f"planted fault, {kind}: expected to be noticed {wanted} times of {len(chosen)}, was {noticed} times"
            )
    await client.close()


def wrong_question(question: Question, kind: str, rng: random.Random) -> Question:
    """A prompt with one of `PLANTED` in it."""
    prompt = question.prompt_ids
    if kind == "the first page":
        size = min(256, len(prompt) // 2)
        return Question((*random_ids(rng, size), *prompt[size:]), question.new_tokens)
    end = max(1, len(prompt) - 4)
    begin = max(0, end - (96 if kind == "most of the window" else 1))
    wrong = (token_id ^ 1 for token_id in prompt[begin:end])
    return Question((*prompt[:begin], *wrong, *prompt[end:]), question.new_tokens)


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
