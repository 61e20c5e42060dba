"""The checker: right answers pass, and each kind of wrong one fails with words that say what is wrong."""

import asyncio
from dataclasses import replace

import pytest

from sglang_dsv4.check.stress.answers import Answer, Outcome
from sglang_dsv4.check.stress.bound import served_bound
from sglang_dsv4.check.stress.cases import CHAT, COMPLETIONS, Case
from sglang_dsv4.check.stress.check import Reference, judge, judge_outcome, read_reference
from sglang_dsv4.check.stress.drive import leaks
from sglang_dsv4.check.stress.references import Judge

BOUND = 0.01
PROMPT = (9, 10, 11)
REFERENCE = Reference(PROMPT, (5, 6, 7), (-0.1, -0.2, -0.3), (1.0, 0.015, 2.0), "abc", "length")
RIGHT = Answer(0, "abc", (5, 6, 7), (-0.1, -0.2, -0.3), "length", prompt_tokens=3)
CASE = Case(0, "short", prompts=(PROMPT,), new_tokens=3)


def faults(answer: Answer, *, is_whole: bool = True) -> str:
    return " / ".join(judge(answer, REFERENCE, BOUND, is_whole=is_whole).faults)


def test_a_right_answer_passes():
    verdict = judge(RIGHT, REFERENCE, BOUND, is_whole=True)
    assert (verdict.faults, verdict.compared, verdict.doubt) == ((), 3, None)
    near = replace(RIGHT, logprobs=(-0.1, -0.2, -0.3 - 0.9 * BOUND))
    verdict = judge(near, REFERENCE, BOUND, is_whole=True)
    assert not judge(replace(near, logprobs=(None, *near.logprobs[1:])), REFERENCE, BOUND, is_whole=True).faults
    assert not verdict.faults and verdict.largest == pytest.approx(0.9 * BOUND)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": (5, 6, 8)}, "generated token 2 is 8, expected 7"),
        ({"token_ids": (4, 6, 7)}, "generated token 0 is 4, expected 5"),
        ({"logprobs": (-0.1, -0.2, -0.3 - 1.1 * BOUND)}, "token 2 is off by"),
        ({"logprobs": (-0.1, float("nan"), -0.3)}, "token 1 is off by nan"),
        ({"logprobs": (None, -0.2, -0.3 - 1.1 * BOUND)}, "token 2 is off by"),
        ({"token_ids": (4, 6, 7), "logprobs": (None, -0.2, -0.3)}, "generated token 0 is 4"),
        ({"token_ids": (5, 6), "logprobs": (-0.1, -0.2)}, "expected 3 generated tokens, got 2"),
        ({"token_ids": (5, 6, 7, 8)}, "expected 3 generated tokens, got 4"),
        ({"text": "ab"}, "expected the text 'abc', got 'ab'"),
        ({"finish": None}, "has no end"),
        ({"finish": "abort"}, "has no end"),
        ({"finish": "stop"}, "expected the end length, got stop"),
        ({"token_ids": None, "logprobs": None, "finish": None}, "has no end"),
    ],
)
def test_a_wrong_answer_fails(changes, message):
    assert message in faults(replace(RIGHT, **changes))


def test_tokens_may_differ_only_where_the_two_best_are_too_close_to_tell():
    other = replace(RIGHT, token_ids=(5, 8, 9), text="axy")
    verdict = judge(other, REFERENCE, BOUND, is_whole=True)
    assert (verdict.faults, verdict.doubt) == ((), 1)
    # Each of two log-probabilities moves by at most the bound: ahead by more than twice that is certain.
    certain = replace(REFERENCE, margins=(1.0, 2.1 * BOUND, 2.0))
    assert judge(other, certain, BOUND, is_whole=True).faults


def test_a_text_without_tokens_is_compared_unless_one_is_in_doubt():
    certain = replace(REFERENCE, margins=(1.0, 1.0, 2.0))
    text = replace(RIGHT, token_ids=None, logprobs=None, text="abd")
    assert judge(text, certain, BOUND, is_whole=True).faults
    assert judge(text, REFERENCE, BOUND, is_whole=True).doubt == 1
    assert not judge(replace(text, text="abc"), certain, BOUND, is_whole=True).faults


@pytest.mark.parametrize(
    ("changes", "is_right"),
    [
        ({"token_ids": (5, 6), "text": "ab"}, True),
        ({"token_ids": (5, 6), "text": "a\ufffd"}, True),
        ({"token_ids": (5, 6), "text": "b"}, False),
        ({"token_ids": (4,), "text": "a"}, False),
        ({"token_ids": (), "logprobs": (), "text": ""}, True),
    ],
)
def test_an_answer_whose_client_left_must_be_a_beginning(changes, is_right):
    assert (faults(replace(RIGHT, finish=None, **changes), is_whole=False) == "") is is_right


@pytest.mark.parametrize(
    ("case", "status", "num_answers", "message"),
    [
        (CASE, 200, 1, None),
        (CASE, 500, 0, "expected status 200, got 500"),
        (CASE, 200, 0, "expected 1 answers, got 0"),
        (replace(CASE, n=3), 200, 2, "expected 3 answers, got 2"),
        (replace(CASE, invalid={}), 400, 0, None),
        (replace(CASE, invalid={}), 200, 0, "expected the body to be refused, got status 200"),
        (replace(CASE, invalid={}), 500, 0, "expected the body to be refused, got status 500"),
    ],
)
def test_what_must_come_at_all(case, status, num_answers, message):
    found = judge_outcome(Outcome(case, status, (RIGHT,) * num_answers))
    assert found == ([] if message is None else [message])


def test_a_leaked_page_is_named_with_its_pool():
    usage = {
        "history_pages": {"total": 20, "free": 12, "cached": 8, "used": 0},
        "window_pages": {"total": 18, "free": 9, "cached": 8, "used": 1},
    }
    assert leaks(usage) == ["leak: window_pages: 1 of 18 are in use though no request runs"]
    usage["window_pages"]["used"] = 0
    assert leaks(usage) == []
    usage["history_pages"]["used"] = -1  # freed twice
    assert leaks(usage) == ["leak: history_pages: -1 of 20 are in use though no request runs"]


def reply(**changes):
    meta = {
        "output_token_logprobs": [[-0.1, 5, None], [-0.2, 6, None]],
        "output_top_logprobs": [[[-0.1, 5, None], [-1.1, 4, None]], [[-0.2, 6, None], [-0.7, 4, None]]],
        "cached_tokens": 0,
        "finish_reason": {"type": "length"},
    }
    return {"text": "ab", "meta_info": {**meta, **changes}}


def test_a_reference_has_margins_and_comes_from_a_cold_cache():
    reference = read_reference(PROMPT, reply())
    assert reference.token_ids == (5, 6) and reference.margins == pytest.approx((1.0, 0.5))
    with pytest.raises(ValueError, match="cold cache, got 256"):
        read_reference(PROMPT, reply(cached_tokens=256))
    with pytest.raises(ValueError, match="two best"):
        read_reference(PROMPT, reply(output_top_logprobs=[[[-0.1, 5, None]]] * 2))


class Asked:
    """Answers questions from a table, and counts them."""

    def __init__(self, table):
        self.table, self.questions = table, []

    async def ask(self, question):
        self.questions.append(question)
        return self.table[question]

    async def tokenize(self, message):
        return PROMPT


def judged(asked, outcome):
    checker = Judge(asked.ask, asked.tokenize, BOUND)
    return asyncio.run(checker.add(outcome)), checker.findings


QUESTION = (PROMPT, 3, ())
REST = ((*PROMPT, 5, 8), 1, ())


@pytest.mark.parametrize(("last", "is_right"), [(9, True), (3, False)])
def test_behind_a_doubt_the_rest_is_compared_with_a_reference_of_its_own(last, is_right):
    rest = Reference(REST[0], (9,), (-0.4,), (1.0,), "z", "length")
    asked = Asked({QUESTION: REFERENCE, REST: rest})
    answer = replace(RIGHT, token_ids=(5, 8, last), logprobs=(-0.1, -0.2, -0.4), text="xyz")
    found, findings = judged(asked, Outcome(CASE, 200, (answer,)))
    assert (found == []) is is_right and findings.num_doubts == 1
    assert asked.questions == [QUESTION, REST]


def test_a_question_is_asked_once_and_chats_are_asked_by_their_tokens():
    asked = Asked({QUESTION: REFERENCE})
    checker = Judge(asked.ask, asked.tokenize, BOUND)
    text = replace(RIGHT, token_ids=None, logprobs=None)
    for case, answer in (
        (CASE, RIGHT),
        (replace(CASE, endpoint=COMPLETIONS), RIGHT),
        (Case(1, "chat", CHAT, message="hi", new_tokens=3), text),
    ):
        assert asyncio.run(checker.add(Outcome(case, 200, (answer,)))) == []
    assert asked.questions == [QUESTION] and checker.findings.num_answers == 3
    wrong = replace(RIGHT, token_ids=(5, 6, 8))
    assert asyncio.run(checker.add(Outcome(CASE, 200, (wrong,))))
    ((outcome, fault),) = checker.findings.mismatches
    assert outcome.answers == (wrong,) and "token 2" in fault


@pytest.mark.parametrize(("off", "expected"), [(0.003, 0.012), (0.0, 0.0)])
def test_a_server_elsewhere_is_measured_by_reading_its_tokens_again(off, expected):
    async def read_again(prompt_ids, token_ids):
        assert (prompt_ids, token_ids) == (PROMPT, (5, 6, 7))
        return (-0.1, -0.2 + off, -0.3)

    bound = asyncio.run(served_bound([REFERENCE, REFERENCE], read_again))
    assert bound == pytest.approx(expected)
