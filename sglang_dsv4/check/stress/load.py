"""Keeps a number of requests in flight, and watches the pools."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress

from sglang_dsv4.check.stress.cases import Case, make_case
from sglang_dsv4.check.stress.replies import Outcome

SAMPLE_S = 5.0
Send = Callable[[Case], Awaitable[Outcome]]
Facts = Callable[[], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class Load:
    """What is asked, and for how long.

    Attributes:
        seed (int): of every case.
        first (int): number of the first case.
        requests (int | None): how many; None: until ``minutes`` are over.
        minutes (float): no request starts later, if ``requests`` is None.
        concurrency (int): requests in flight.
    """

    seed: int
    first: int
    requests: int | None
    minutes: float
    concurrency: int


class Watch:
    """Shows outcomes as they come, and counts those in a row without a reply."""

    def __init__(self, progress: Progress, load: Load) -> None:
        self.num_done = self.num_silent = 0
        self._num_answers = 0
        self._progress = progress
        self._task = progress.add_task("requests", total=load.requests)

    def note(self, outcome: Outcome) -> None:
        """One more."""
        self.num_done += 1
        self._num_answers += len(outcome.answers)
        self.num_silent = 0 if outcome.status else self.num_silent + 1
        self._progress.update(self._task, advance=1, description=f"requests, {self._num_answers} answers")


async def drive(send: Send, load: Load, step: Callable[[Outcome], None], is_ended: Callable[[], bool]) -> list[Outcome]:
    """Send cases, ``load.concurrency`` at a time, until the load is done or ``is_ended``.

    Returns:
        list[Outcome]: in the order of the cases.
    """
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + 60 * load.minutes
    numbers = iter(range(load.first, load.first + (load.requests or 1 << 62)))

    async def work() -> None:
        for number in numbers:
            if is_ended() or (load.requests is None and time.monotonic() >= deadline):
                return
            outcome = await send(make_case(load.seed, number))
            outcomes.append(outcome)
            step(outcome)

    await asyncio.gather(*(work() for _ in range(load.concurrency)))
    return sorted(outcomes, key=lambda outcome: outcome.case.number)


@dataclass(frozen=True)
class Sample:
    """The pools at one moment.

    Attributes:
        at_s (float): since the load began.
        usage (dict[str, dict[str, int]]): as the plug-in reports it.
        done (int): requests answered.
        memory (dict[str, int]): bytes, by what holds them.
    """

    at_s: float
    usage: dict[str, dict[str, int]]
    done: int
    memory: dict[str, int]


async def sample_pools(facts: Facts, samples: list[Sample], done: Callable[[], int]) -> None:
    """Note the use of the pools every `SAMPLE_S` seconds, until cancelled."""
    began = time.monotonic()
    while True:
        now = await facts()
        samples.append(Sample(time.monotonic() - began, now["usage"], done(), now["memory"]))
        await asyncio.sleep(SAMPLE_S)


def leaks(usage: dict[str, dict[str, int]]) -> list[str]:
    """What a server without a request still holds: pool by pool, all must be free or kept for later prefixes."""
    return [
        f"leak: {pool}: {use['used']} of {use['total']} are in use though no request runs"
        for pool, use in usage.items()
        if use["used"] != 0
    ]


async def wait_until_unused(facts: Facts, patience_s: float) -> tuple[dict[str, Any], Sequence[str]]:
    """Wait for the last aborted request to be gone; the facts then, and what was still held after ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while True:
        now = await facts()
        found = leaks(now["usage"])
        if not found or time.monotonic() > deadline:
            return now, found
        await asyncio.sleep(0.25)
