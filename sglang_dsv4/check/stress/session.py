"""A whole stress test of one target: load, leak check, comparison, control."""

import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.progress import Progress

from sglang_dsv4.check.bound import measured_bound, served_bound
from sglang_dsv4.check.judge import compare_reply
from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.check.reply import Ids, Question, Reply, Token
from sglang_dsv4.check.stress.control import control_answer, has_logprobs, is_served, wrong_prompts
from sglang_dsv4.check.stress.judging import Judge
from sglang_dsv4.check.stress.load import Load, Sample, Watch, wait_until_unused
from sglang_dsv4.check.stress.replies import Outcome
from sglang_dsv4.check.stress.summary import GIVEN, Run

# Sequences over which rounding is measured: transformers takes a second for each, the server itself little.
NUM_BOUND_SAMPLES, NUM_SERVED_SAMPLES = 4, 24


IsStopped = Callable[[], bool]
Score = Callable[[Ids, Ids], Awaitable[Sequence[Token]]]


class Target(Protocol):
    """What is put under stress: a server, or a runtime in this process."""

    name: str
    idle_s: float

    async def run(self, load: Load, watch: Watch, is_stopped: IsStopped) -> tuple[Sequence[Outcome], Sequence[Sample]]: ...

    async def ask(self, question: Question) -> Reply: ...

    async def score(self, prompt_ids: Ids, token_ids: Ids) -> Sequence[Token]: ...

    async def tokenize(self, message: str) -> Ids: ...

    async def facts(self) -> dict[str, Any]: ...

    async def close(self) -> None: ...


async def stress(
    target: Target, load: Load, progress: Progress, *, bound: float | None = None, is_stopped: IsStopped = lambda: False
) -> Run:
    """Put a target under stress.

    Args:
        target (Target): what is asked; closed at the end.
        load (Load): what is asked of it.
        progress (Progress): where it is shown.
        bound (float | None): largest allowed difference of a log-probability; None: it is measured.
        is_stopped (Callable[[], bool]): True: no more requests are sent, and those that were are judged.

    Raises:
        ConnectionError: a server stopped answering.
        ValueError: our cache does not run there, or nothing was answered.
        httpx.HTTPError: a server refused a request that was sent alone.
    """
    try:
        start, _ = await wait_until_unused(target.facts, target.idle_s)
        began = time.monotonic()
        outcomes, samples = await target.run(load, Watch(progress, load), is_stopped)
        load_s = time.monotonic() - began
        end, leaks = await wait_until_unused(target.facts, target.idle_s)
        checker, origin = Judge(target.ask, target.tokenize), GIVEN
        if bound is None:
            bound, origin = await _measure_bound(checker, outcomes, end, target.score)
        checker.bound = bound
        control = await _compare(checker, outcomes, progress)
    finally:
        await target.close()
    return Run(target.name, load, outcomes, checker, origin, control, leaks, start, end, samples, load_s)


async def _compare(checker: Judge, outcomes: Sequence[Outcome], progress: Progress) -> tuple[str, ...]:
    """Judge all outcomes; then the control: what the judge says of an answer to the first wrong prompt that it notices."""
    task = progress.add_task("comparing", total=len(outcomes))
    for outcome in outcomes:
        await checker.add(outcome)
        shown = f"comparing, {checker.num_references} alone, {len(checker.mismatches)} mismatches"
        progress.update(task, advance=1, description=shown)
    chosen = control_answer(outcomes)
    if chosen is None:
        return ()
    outcome, index = chosen
    answer, question = outcome.answers[index], await checker.question(outcome, index)
    for wrong, where in wrong_prompts(question.prompt_ids, has_logprobs=has_logprobs(answer)):
        reference = await checker.reference(question._replace(prompt_ids=wrong))
        found = compare_reply(answer, reference, checker.bound, is_whole=True)
        if found.faults:
            return tuple(f"{where}: {fault}" for fault in found.faults)
    return ()


async def _measure_bound(checker: Judge, outcomes: Sequence[Outcome], facts: dict[str, Any], score: Score) -> tuple[float, str]:
    """The bound and where it comes from: transformers on the checkpoint, or else the server itself.

    It is measured over the longest sequences: errors grow with the context.
    """
    pairs = [(outcome, index) for outcome in outcomes if is_served(outcome) for index in range(len(outcome.answers))]
    questions = {await checker.question(outcome, index) for outcome, index in pairs}
    by_length = sorted(questions, key=lambda question: (len(question.prompt_ids), question))
    if not by_length:
        raise ValueError("expected at least one answer to compare, got none")
    checkpoint = _checkpoint_of(facts)
    longest = by_length[-(NUM_SERVED_SAMPLES if checkpoint is None else NUM_BOUND_SAMPLES) :]
    references = [(question.prompt_ids, await checker.reference(question)) for question in longest]
    if checkpoint is None:
        return await served_bound(references, score), "by the server's own rounding"
    sequences = [(*prompt_ids, *reply.token_ids[:-1]) for prompt_ids, reply in references]
    return measured_bound(Oracle(checkpoint), sequences, facts["report"]["row_format"]), "by transformers' rounding"


def _checkpoint_of(facts: dict[str, Any]) -> Path | None:
    """The checkpoint, where transformers on a CPU rounds as the server does."""
    path = Path(str(facts["model_path"]))
    is_alike = facts["dtype"] == "float32" and facts["device"] == "cpu"
    return path if is_alike and path.is_dir() else None
