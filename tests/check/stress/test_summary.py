"""The result: what it counts, what it prints, what it draws, and the command that sends a request again."""

import io
import json
import mmap
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from sglang_dsv4.check.judge import Verdict
from sglang_dsv4.check.reply import Reply, Token
from sglang_dsv4.check.stress.cases import COMPLETIONS, Case
from sglang_dsv4.check.stress.command import Interrupt
from sglang_dsv4.check.stress.control import control_answer, wrong_prompts
from sglang_dsv4.check.stress.load import Load, Sample, leaks
from sglang_dsv4.check.stress.replies import Outcome
from sglang_dsv4.check.stress.report import draw_run, print_run
from sglang_dsv4.check.stress.summary import Run, percentiles
from sglang_dsv4.plugin.observe.occupancy import pool_usage, process_bytes

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
RUN = Run(
    target="http://server",
    load=Load(seed=7, first=0, requests=30, minutes=0.0, concurrency=16),
    outcomes=OUTCOMES,
    verdict=Verdict(answers=30, tokens=60),
    mismatches=(),
    bound=1e-4,
    bound_origin="measured",
    control=("with 1 of 400 tokens replaced, starting at 100: off",),
    leaks=(),
    start=FACTS,
    end=FACTS,
    samples=[Sample(5.0 * i, USAGE, 10 * i, GROWN) for i in range(4)],
    load_s=15.0,
    num_references=3,
)


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
            {"mismatches": [(OUTCOMES[20], "token 2 is 8")]},
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
    again = replace(RUN, bound=0.25, bound_origin="given").again(OUTCOMES[3])
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


def test_memory_of_a_process():
    held = process_bytes(torch.device("cpu"))
    assert held["device_bytes"] == 0
    size = 64 << 20
    with mmap.mmap(-1, size) as more:  # new pages, whatever the process has given back to its heap
        more.write(b"x" * size)
        grown = process_bytes(torch.device("cpu"))["resident_bytes"] - held["resident_bytes"]
    assert grown > size // 2


def scheduler(held_tokens=0, free_slots=4):
    stats = SimpleNamespace(
        full_available_size=2048 - held_tokens,
        full_evictable_size=512,
        full_num_used=held_tokens,
        swa_available_size=1024,
        swa_evictable_size=256,
        swa_num_used=0,
    )
    slots = SimpleNamespace(size=4, available_size=lambda: free_slots)
    observer = SimpleNamespace(get_pool_stats=lambda: stats)
    return SimpleNamespace(pool_stats_observer=observer, req_to_token_pool=slots)


def test_the_use_of_pools_in_pages():
    usage = pool_usage(scheduler(), 256)
    assert usage["history_pages"] == {"total": 10, "free": 8, "cached": 2, "used": 0}
    assert usage["window_pages"] == {"total": 5, "free": 4, "cached": 1, "used": 0}
    assert leaks(usage) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"held_tokens": 256}, "history_pages: 1 of 10"),
        ({"held_tokens": 1}, "history_pages: 1 of 10"),
        ({"held_tokens": -256}, "history_pages: -1 of 10"),
        ({"free_slots": 3}, "request_slots: 1 of 4"),
    ],
)
def test_a_leak_of_less_than_a_page_shows(fault, message):
    (found,) = leaks(pool_usage(scheduler(**fault), 256))
    assert message in found
