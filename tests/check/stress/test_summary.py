"""The result: what it counts, what it prints, what it draws, and the command that sends a request again."""

import io
import json
import signal
from dataclasses import replace

import pytest
from rich.console import Console

from sglang_dsv4.check.reply import Reply, Token
from sglang_dsv4.check.stress.cases import COMPLETIONS, Case
from sglang_dsv4.check.stress.command import Interrupt
from sglang_dsv4.check.stress.control import control_answer, wrong_prompts
from sglang_dsv4.check.stress.judging import Judge
from sglang_dsv4.check.stress.load import Load, Sample
from sglang_dsv4.check.stress.replies import Outcome
from sglang_dsv4.check.stress.report import draw_run, print_run
from sglang_dsv4.check.stress.summary import Run, percentiles

USAGE = {"history_pages": {"total": 20, "free": 12, "cached": 8, "used": 0}}
FACTS = {
    "usage": USAGE,
    "report": {"total_bytes": 3 << 20},
    "memory": {"resident_bytes": 5 << 20, "device_bytes": 0},
    "enable_cache_report": False,
}
GROWN = {"resident_bytes": 6 << 20, "device_bytes": 0}
ANSWER = Reply((Token(5, -0.1), Token(6, -0.2)), "ab", "length", 400, 256, 1)
OUTCOMES = [Outcome(Case(number, "short", prompts=((9,) * 400,)), 200, (ANSWER,), seconds=number + 1.0) for number in range(30)]
JUDGE = Judge(None, None, bound=1e-4)
JUDGE.verdict.answers, JUDGE.verdict.tokens = 30, 60
RUN = Run(
    target="http://server",
    load=Load(seed=7, first=0, requests=30, minutes=0.0, concurrency=16),
    outcomes=OUTCOMES,
    judge=JUDGE,
    bound_origin="measured",
    control=("with 1 of 400 tokens replaced, starting at 100: off",),
    leaks=(),
    start=FACTS,
    end=FACTS,
    samples=[Sample(5.0 * i, USAGE, 10 * i, GROWN) for i in range(4)],
    load_s=15.0,
)


def judge_of(**attributes):
    judge = Judge(None, None)
    vars(judge).update(attributes)
    return judge


def printed(run):
    console = Console(file=io.StringIO(), width=200)
    print_run(console, run)
    return console.file.getvalue()


def test_a_right_run():
    facts = json.loads(json.dumps(RUN.to_dict()))
    assert facts["faults"] == [] and facts["retractions"] == 30
    assert facts["cached_share"] == pytest.approx(256 / 400)
    assert facts["seconds"]["p50"] == pytest.approx(15.5) and facts["seconds"]["max"] == 30
    text = printed(RUN)
    assert "RIGHT  30 requests, 0 mismatches, 0 leaks" in text and "64.0%" in text
    assert "5.0 MiB at the start, 6.0 half way, 5.0 at the end" in text
    assert "device memory" not in text and "lost 0 log-probabilities" in text


def test_the_cached_share_leaves_out_endpoints_that_do_not_say():
    silent = replace(OUTCOMES[0].answers[0], cached_tokens=0)
    completions = replace(OUTCOMES[0].case, endpoint=COMPLETIONS)
    outcomes = [*OUTCOMES, replace(OUTCOMES[0], case=completions, answers=(silent,) * 30)]
    run = replace(RUN, outcomes=outcomes)
    assert run.to_dict()["cached_share"] == pytest.approx(256 / 400)
    run = replace(run, end={**FACTS, "enable_cache_report": True})
    assert run.to_dict()["cached_share"] == pytest.approx(128 / 400)


def test_lost_log_probabilities_are_counted_and_slow_clients_left_out_of_latencies():
    lost = replace(ANSWER, tokens=(Token(5), ANSWER.tokens[1]))
    slow = replace(OUTCOMES[0], case=replace(OUTCOMES[0].case, pause_s=4.0), seconds=900.0)
    facts = replace(RUN, outcomes=[*OUTCOMES, slow, replace(OUTCOMES[1], answers=(lost,))]).to_dict()
    assert facts["lost_logprobs"] == 1 and facts["seconds"]["max"] == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"judge": judge_of(mismatches=[(OUTCOMES[20], "token 2 is 8")])},
            "request 20 (short): token 2 is 8; again: python -m sglang_dsv4 stress http://server --seed 7 --first 4 "
            "--requests 17 --concurrency 16",
        ),
        ({"leaks": ["leak: window_pages: 1 of 18"]}, "leak: window_pages: 1 of 18"),
        ({"control": ()}, "the comparison proves nothing"),
        (
            {"end": {**FACTS, "report": {"total_bytes": 4 << 20}}},
            "leak: the cache had 3145728 bytes at the start, and has 4194304",
        ),
    ],
)
def test_each_wrong_thing_fails(changes, message):
    run = replace(RUN, **changes)
    assert run.to_dict()["faults"] == run.faults and len(run.faults) == 1
    text = printed(run)
    assert message in text and "FAILED  1 faults" in text and "RIGHT" not in text


def test_a_bound_that_was_given_is_given_again():
    again = replace(RUN, judge=judge_of(bound=0.25), bound_origin="given").again(OUTCOMES[3])
    assert again.endswith("--first 0 --requests 4 --concurrency 16 --bound 0.25")
    assert "--bound" not in RUN.again(OUTCOMES[3])


def test_the_plot_is_a_picture(tmp_path):
    draw_run(RUN, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_the_control_takes_the_longest_prompt_with_log_probabilities():
    bare = replace(ANSWER, prompt_tokens=900, tokens=(Token(5), Token(6)))
    left = replace(OUTCOMES[1], case=replace(OUTCOMES[1].case, leave_after=2))
    short = replace(OUTCOMES[2], answers=(replace(ANSWER, prompt_tokens=5),))
    outcomes = [left, short, OUTCOMES[0], replace(OUTCOMES[3], answers=(bare,))]
    assert control_answer(outcomes) == (OUTCOMES[0], 0)
    assert control_answer([left]) is None


def test_the_control_goes_from_one_token_to_all():
    prompt = tuple(range(8, 48))
    one, entry, more, all_of_it = wrong_prompts(prompt, has_logprobs=True)
    assert one == ((*prompt[:10], 19, *prompt[11:]), "with 1 of 40 tokens replaced, starting at 10")
    assert entry[0] == (*prompt[:10], 19, 18, 21, 20, *prompt[14:])
    assert [a != b for a, b in zip(more[0], prompt, strict=True)] == [False] * 8 + [True] * 32
    assert all_of_it == (tuple(i ^ 1 for i in prompt), "with 40 of 40 tokens replaced, starting at 0")
    first, *_ = wrong_prompts(prompt, has_logprobs=False)
    assert first[0] == (*prompt[:39], 46)
    assert [wrong for wrong, _ in wrong_prompts((9,), has_logprobs=True)] == [(8,)]


def test_percentiles_of_few_values():
    assert percentiles([]) == {}
    assert percentiles([2.0]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0, "max": 2.0}


def test_ctrl_c_ends_the_load_first_and_then_all_and_before_the_load_all_at_once(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    console = Console(file=io.StringIO())
    interrupt = Interrupt(console)
    with pytest.raises(KeyboardInterrupt):
        handlers[signal.SIGINT](signal.SIGINT, None)
    assert not interrupt()
    handlers[signal.SIGINT](signal.SIGINT, None)
    assert interrupt() and "the answers so far are compared" in console.file.getvalue()
    with pytest.raises(KeyboardInterrupt):
        handlers[signal.SIGINT](signal.SIGINT, None)
