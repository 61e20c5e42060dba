"""A whole comparison: answers, their bound, the verdict, and faults that must be noticed."""

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_dsv4.compare import hit_bytes
from sglang_dsv4.compare.ask import Question, Scorer, Token, ask_all
from sglang_dsv4.compare.client import ServeClient
from sglang_dsv4.compare.exact import exact_differences
from sglang_dsv4.compare.judge import Spread, Verdict, judge, own_rounding, run_spread, spread_of
from sglang_dsv4.compare.prompts import random_ids
from sglang_dsv4.compare.runs import Fleet, Passes, Run, write_answers
from sglang_dsv4.compare.side import Side, SideServer

NUM_SCORED = 24
NUM_PLANTED = 4
# Faults that are planted, and what share of them must be noticed.
PLANTED = {"the first page": 1.0, "most of the window": 1.0, "a token of the window": 0.5}
# One token moves an answer by about 1, as bf16 and fp8 rows may; it is planted only where rounding is much less.
SHARP_BOUND = 0.1
Say = Callable[[str], None]


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
    """

    reference: list[Side]
    judged: list[Side]
    rounded: Side | None
    passes: Passes
    at_once: int
    num_exact: int

    @property
    def sides(self) -> list[Side]:
        """All of them, in the order in which they start: the one that is asked for scores is first."""
        return [*self.reference, *self.judged, *([self.rounded] if self.rounded else [])]


@dataclass
class Result:
    """What came out; ``faults`` empty means that all is right."""

    bound: dict[str, float] = field(default_factory=dict)
    from_exact: dict[str, dict[str, float]] = field(default_factory=dict)
    own: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    verdicts: dict[str, dict[str, object]] = field(default_factory=dict)
    planted: list[dict[str, Any]] = field(default_factory=list)
    bytes: dict[str, Any] | None = None
    faults: list[str] = field(default_factory=list)


async def compare_tokens(
    fleet: Fleet, checkpoint: Path, plan: Plan, result: Result, say: Say
) -> None:
    """Compare greedy tokens and their log-probabilities; findings go to ``result``."""
    questions = plan.passes.questions
    found: dict[str, list[Run]] = {}
    # The reference stays to be asked for scores, and one judged server to be asked with planted faults.
    kept: dict[Side, SideServer] = {}

    async def ask(server: SideServer) -> None:
        found[server.side.name] = await _ask(server, plan.passes)
        answered = [run for runs in found.values() for run in runs]
        write_answers(fleet.folder / "answers.json", questions, answered)
        say(f"{server.side.name}: {len(questions)} questions, cold, hit and again")

    for begin in range(0, len(plan.sides), plan.at_once):
        servers = fleet.start(plan.sides[begin : begin + plan.at_once])
        # At the same time: the first steps of every server compile, and nothing is timed.
        await asyncio.gather(*map(ask, servers))
        ends = (plan.reference[0], plan.judged[-1])
        kept |= {server.side: server for server in servers if server.side in ends}
        fleet.end([server for server in servers if server.side not in kept])
    anchor, last = kept[plan.reference[0]], kept[plan.judged[-1]]
    client = ServeClient(anchor.url)
    scorer = Scorer(client, plan.passes.concurrency)
    reference = [run for side in plan.reference for run in found[side.name]]
    judged = [run for side in plan.judged for run in found[side.name]]
    scored = await _scores(questions, reference[0], scorer)
    exact = Spread()
    if plan.num_exact:
        say(f"{plan.num_exact} answers of either backend in exact arithmetic")
        for name, run in (("reference", reference[0]), ("judged", judged[0])):
            differences = exact_differences(checkpoint, questions, run.answers, plan.num_exact)
            result.from_exact[name] = asdict(spread_of(differences))
        exact = Spread(**result.from_exact["reference"])
    bound = bound_of(
        reference, judged, found.get(plan.rounded.name) if plan.rounded else None, scored, exact
    )
    result.bound = bound
    for side in plan.sides:
        cold, hit, again = (run.answers for run in found[side.name])
        result.own[side.name] = {
            "hit": asdict(run_spread(cold, hit)),
            "again": asdict(run_spread(cold, again)),
        }
    for run in (*reference, *judged):
        result.runs.append({"name": run.name, "cached_tokens": run.cached_tokens})
        if run.name.endswith(" hit") and not run.cached_tokens:
            result.faults.append(f"{run.name}: expected prefix hits, got none")
    for run in judged:
        verdict = Verdict()
        await scorer.prepare(questions, reference[0].answers, run.answers)
        for number, answer in enumerate(run.answers):
            await judge(
                verdict, f"{run.name}: question {number}", questions[number],
                reference[0].answers[number], answer, bound["bound"], scorer,
            )  # fmt: skip
        if verdict.typical > bound["typical_bound"]:
            verdict.faults.insert(
                0,
                f"{run.name}: log-probabilities are {verdict.typical:.3g} away as a rule, expected at most "
                f"{bound['typical_bound']:.3g}",
            )
        result.verdicts[run.name] = verdict.to_dict()
        result.faults += verdict.faults[:3]
    await _plant(last, questions, reference[0], bound["bound"], scorer, result)
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
    runs = await passes.run(client, server.side.name)
    await client.close()
    return runs


async def _scores(questions: Sequence[Question], run: Run, scorer: Any) -> dict[int, list[Token]]:
    """The reference's scores of its own tokens, for some questions."""
    step = max(1, len(questions) // NUM_SCORED)
    return {
        number: await scorer(questions[number].prompt_ids, run.answers[number].token_ids)
        for number in range(0, len(questions), step)
    }


def bound_of(
    reference: Sequence[Run],
    judged: Sequence[Run],
    rounded: Sequence[Run] | None,
    scored: dict[int, list[Token]],
    exact: Spread,
) -> dict[str, float]:
    """Differences that are allowed, of one token and of all as a rule (the root of their mean square), and whence they come.

    Two backends round in other places, so each may be as far from exact arithmetic as the reference is, and the two twice
    that apart. The reference's own ways round in the same places, and are closer to each other than to exact arithmetic;
    where nothing exact is known, they have to do. Another row format adds what it does to the judged backend, twice for the
    same reason.
    """
    own = own_rounding([run.answers for run in reference], scored)
    rows = Spread() if rounded is None else run_spread(judged[0].answers, rounded[0].answers)
    least = own.or_more(exact)
    return {
        "own_rounding": own.largest,
        "from_exact": exact.largest,
        "row_rounding": rows.largest,
        "bound": 2 * least.largest + 2 * rows.largest,
        "typical_own_rounding": own.typical,
        "typical_from_exact": exact.typical,
        "typical_row_rounding": rows.typical,
        "typical_bound": 2 * least.typical + 2 * rows.typical,
    }


async def _plant(
    server: SideServer,
    questions: Sequence[Question],
    reference: Run,
    bound: float,
    scorer: Any,
    result: Result,
) -> None:
    """Answers to prompts with a fault must be noticed: wrong tokens in the window, and a wrong page far behind it."""
    most = sorted(
        range(len(questions)),
        key=lambda number: (questions[number].new_tokens, len(questions[number].prompt_ids)),
    )
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
    checkpoint: Path,
    folder: Path,
    device: str,
    plan: Plan | None,
    bytes_side: Side | None,
    say: Say,
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
