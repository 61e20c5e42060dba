"""The stress test of the in-process runtime: right as it is, and a held page and a wrong token are found."""

import asyncio
from dataclasses import replace

import pytest
from rich.progress import Progress

from sglang_dsv4.check.stress import session
from sglang_dsv4.check.stress.load import Load
from sglang_dsv4.check.stress.runtime_target import RuntimeTarget

pytestmark = pytest.mark.slow

REQUESTS = 24


def stress(checkpoint, target=RuntimeTarget):
    load = Load(seed=2, first=0, requests=REQUESTS, minutes=0.0, concurrency=8)
    with Progress(disable=True) as progress:
        return asyncio.run(session.stress(target(checkpoint, 64, load.concurrency), load, progress))


class Hurt(RuntimeTarget):
    """Holds a page, and changes a token."""

    def send(self, cases):
        outcomes = super().send(cases)
        if cases[0].number:
            return outcomes
        self.held = self.runtime.open([9, 10, 11])
        at = next(i for i, o in enumerate(outcomes) if o.answers and o.case.leave_after is None)
        answer = outcomes[at].answers[0]
        last = answer.tokens[-1]
        wrong = replace(answer, tokens=(*answer.tokens[:-1], last._replace(token_id=last.token_id ^ 1)))
        outcomes[at] = replace(outcomes[at], answers=(wrong, *outcomes[at].answers[1:]))
        return outcomes


@pytest.mark.long
def test_a_run_is_right(small_checkpoint):
    run = stress(small_checkpoint)
    assert run.faults == [] and run.control
    assert len(run.outcomes) == REQUESTS and run.judge.verdict.answers >= REQUESTS // 2


@pytest.mark.long
def test_a_held_page_and_a_wrong_token_are_found(small_checkpoint):
    run = stress(small_checkpoint, Hurt)
    (mismatch,) = [fault for fault in run.faults if fault.startswith("request ")]
    assert "token " in mismatch and "--seed 2 --first 0" in mismatch
    assert [leak.split(":")[1].strip() for leak in run.leaks] == ["history_pages", "window_pages", "state_slots"]
