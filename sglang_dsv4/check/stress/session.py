"""A whole stress test of one target: load, leak check, comparison, control."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.progress import Progress

from sglang_dsv4.check.stress.answers import Outcome
from sglang_dsv4.check.stress.bound import ReadAgain, control_answer, measured_bound, served_bound, wrong_prompts
from sglang_dsv4.check.stress.cases import Case, make_case
from sglang_dsv4.check.stress.check import judge, read_reference
from sglang_dsv4.check.stress.client import StressClient
from sglang_dsv4.check.stress.drive import Load, Sample, drive, sample_pools, wait_until_unused
from sglang_dsv4.check.stress.references import Judge, Question, Reference
from sglang_dsv4.check.stress.runtime_target import ROW_FORMAT, RuntimeTarget
from sglang_dsv4.check.stress.summary import GIVEN, Run, is_served

# Requests in a row without a reply, after which the server is taken for gone.
PATIENCE = 20
# Sequences over which rounding is measured: with transformers each costs a second, by the server itself little.
NUM_BOUND_SAMPLES, NUM_SERVED_SAMPLES = 4, 24
Facts = Callable[[], Awaitable[dict[str, Any]]]


class Asked(Protocol):
    """What a comparison needs of a target."""

    async def ask(self, question: Question) -> Reference: ...

    async def tokenize(self, message: str) -> tuple[int, ...]: ...


class ServerTarget:
    """A server that answers requests alone.

    Args:
        client (StressClient): of the server.
    """

    def __init__(self, client: StressClient) -> None:
        self.client = client

    async def ask(self, question: Question) -> Reference:
        """The answer to a question alone on a cold cache."""
        prompt_ids, new_tokens, stop = question
        reply = await self.client.generate_alone(prompt_ids, new_tokens, stop)
        return read_reference(prompt_ids, reply)

    async def tokenize(self, message: str) -> tuple[int, ...]:
        """The tokens of a chat."""
        return await self.client.chat_ids(message)


class Watch:
    """Shows outcomes as they come, and sees when a server is gone."""

    def __init__(self, progress: Progress, load: Load) -> None:
        self.num_done = 0
        self._silent = 0
        self._num_answers = 0
        self._progress = progress
        self._task = progress.add_task("requests", total=load.requests)

    def note(self, outcome: Outcome) -> None:
        """One more."""
        self.num_done += 1
        self._num_answers += len(outcome.answers)
        self._silent = 0 if outcome.status else self._silent + 1
        self._progress.update(self._task, advance=1, description=f"requests, {self._num_answers} answers")

    def is_gone(self) -> bool:
        """Whether nothing has come for long."""
        return self._silent >= PATIENCE


async def stress_server(
    url: str,
    load: Load,
    progress: Progress,
    *,
    target: str,
    bound: float | None,
    memory_bytes: Callable[[], int] | None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Run:
    """Stress a running server.

    Args:
        url (str): of the server.
        load (Load): what is asked.
        progress (Progress): where it is shown.
        target (str): how the command names the server.
        bound (float | None): largest allowed difference of a log-probability; None: it is measured.
        memory_bytes (Callable[[], int] | None): of all the server's processes, if they are known.
        is_stopped (Callable[[], bool]): True: no more requests are sent, and those that were are judged.

    Raises:
        ConnectionError: it stopped answering.
        ValueError: our cache does not run there; or it answered nothing.
        httpx.HTTPError: it refused a request that was sent alone.
    """
    client = StressClient(url)

    async def facts() -> dict[str, Any]:
        now = await client.facts()
        if memory_bytes is not None:
            now["memory"] = {**now["memory"], "all_processes_bytes": memory_bytes()}
        return now

    try:
        start, _ = await wait_until_unused(facts)
        watch, samples, began = Watch(progress, load), list[Sample](), time.monotonic()
        sampler = asyncio.create_task(sample_pools(facts, samples, lambda: watch.num_done))
        outcomes = await drive(client.send, load, watch.note, lambda: watch.is_gone() or is_stopped())
        load_s = time.monotonic() - began
        sampler.cancel()
        (ended,) = await asyncio.gather(sampler, return_exceptions=True)
        if watch.is_gone():
            raise ConnectionError(f"the server stopped answering: {outcomes[-1].faults[0]}")
        if not isinstance(ended, asyncio.CancelledError):
            raise ended
        end, leaks = await wait_until_unused(facts)
        asked = ServerTarget(client)
        checker = Judge(asked.ask, asked.tokenize)
        checkpoint, row_format = _checkpoint_of(end), end["report"]["row_format"]
        checker.bound, origin = await _bound(checker, outcomes, bound, checkpoint, row_format, client.read_again)
        control = await compare(checker, outcomes, progress)
    finally:
        await client.close()
    return Run(
        target,
        load,
        outcomes,
        checker.findings,
        checker.bound,
        origin,
        control,
        leaks,
        start,
        end,
        samples,
        load_s,
        checker.num_references,
    )


async def stress_runtime(
    checkpoint: Path, load: Load, progress: Progress, num_pages: int, is_stopped: Callable[[], bool] = lambda: False
) -> Run:
    """Stress a runtime in this process, ``load.concurrency`` cases in a batch; ``is_stopped`` as in `stress_server`."""
    runtime = RuntimeTarget(checkpoint, num_pages, max_requests=load.concurrency)
    start = await runtime.facts()
    watch, outcomes, began = Watch(progress, load), list[Outcome](), time.monotonic()
    number, deadline = load.first, began + 60 * load.minutes
    last = None if load.requests is None else load.first + load.requests
    while not is_stopped() and (number < last if last is not None else time.monotonic() < deadline):
        upto = number + load.concurrency if last is None else min(number + load.concurrency, last)
        cases: list[Case] = [make_case(load.seed, index) for index in range(number, upto)]
        for outcome in runtime.send(cases):
            outcomes.append(outcome)
            watch.note(outcome)
        number = upto
    load_s = time.monotonic() - began
    end, leaks = await wait_until_unused(runtime.facts, patience_s=0)
    checker = Judge(runtime.ask, runtime.tokenize)
    checker.bound, origin = await _bound(checker, outcomes, None, checkpoint, ROW_FORMAT, None)
    control = await compare(checker, outcomes, progress)
    return Run(
        f"--runtime {checkpoint}",
        load,
        outcomes,
        checker.findings,
        checker.bound,
        origin,
        control,
        leaks,
        start,
        end,
        (),
        load_s,
        checker.num_references,
    )


async def compare(checker: Judge, outcomes: Sequence[Outcome], progress: Progress) -> tuple[str, ...]:
    """Judge all outcomes; then what the judge says of an answer to the first other prompt that it notices."""
    task = progress.add_task("comparing", total=len(outcomes))
    for outcome in outcomes:
        await checker.add(outcome)
        shown = f"comparing, {checker.num_references} alone, {len(checker.findings.mismatches)} mismatches"
        progress.update(task, advance=1, description=shown)
    chosen = control_answer(outcomes)
    if chosen is None:
        return ()
    outcome, answer = chosen
    prompt_ids, new_tokens, stop = await checker.question(outcome, answer)
    for wrong, where in wrong_prompts(prompt_ids, has_logprobs=answer.logprobs is not None):
        reference = await checker.reference((wrong, new_tokens, stop))
        verdict = judge(answer, reference, checker.bound, is_whole=True)
        if verdict.faults:
            return tuple(f"{where}: {fault}" for fault in verdict.faults)
    return ()


async def _bound(
    checker: Judge,
    outcomes: Sequence[Outcome],
    given: float | None,
    checkpoint: Path | None,
    row_format: str,
    read_again: ReadAgain | None,
) -> tuple[float, str]:
    """The bound and where it comes from: the user, transformers on the checkpoint, or else the server itself.

    It is measured over the longest sequences: errors grow with the context.
    """
    if given is not None:
        return given, GIVEN
    answered = [(o, answer) for o in outcomes if is_served(o) for answer in o.answers]
    questions = {await checker.question(outcome, answer) for outcome, answer in answered}
    by_length = sorted(questions, key=lambda question: (len(question[0]), question))
    if not by_length:
        raise ValueError("expected at least one answer to compare, got none")
    if checkpoint is None:
        assert read_again is not None, "only a server's checkpoint may be elsewhere"
        longest = [await checker.reference(q) for q in by_length[-NUM_SERVED_SAMPLES:]]
        return await served_bound(longest, read_again), "by the server's own rounding"
    longest = [await checker.reference(question) for question in by_length[-NUM_BOUND_SAMPLES:]]
    sequences = [(*reference.prompt_ids, *reference.token_ids[:-1]) for reference in longest]
    return measured_bound(checkpoint, sequences, row_format), "by transformers' rounding"


def _checkpoint_of(facts: dict[str, Any]) -> Path | None:
    """The checkpoint, where transformers on a CPU rounds as the server does."""
    path = Path(str(facts["model_path"]))
    is_alike = facts["dtype"] == "float32" and facts["device"] == "cpu"
    return path if is_alike and path.is_dir() else None
