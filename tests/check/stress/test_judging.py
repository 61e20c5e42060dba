"""The judge of a stress test: what it asks for alone, and what it makes of each outcome."""

import asyncio
from dataclasses import replace

import pytest

from sglang_dsv4.check.reply import Question, Reply, Token
from sglang_dsv4.check.stress.cases import CHAT, COMPLETIONS, Case
from sglang_dsv4.check.stress.judging import Judge, outcome_faults
from sglang_dsv4.check.stress.load import leaks
from sglang_dsv4.check.stress.replies import Outcome

BOUND = 0.01
PROMPT = (9, 10, 11)
REFERENCE = Reply((Token(5, -0.1, 5, 1.0), Token(6, -0.2, 6, 0.015), Token(7, -0.3, 7, 2.0)), "abc", "length")
RIGHT = Reply((Token(5, -0.1), Token(6, -0.2), Token(7, -0.3)), "abc", "length", prompt_tokens=3)
CASE = Case(0, "short", prompts=(PROMPT,), new_tokens=3)


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
    found = outcome_faults(Outcome(case, status, (RIGHT,) * num_answers))
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
    return asyncio.run(checker.add(outcome)), checker.verdict


QUESTION = Question(PROMPT, 3)
REST = Question((*PROMPT, 5, 8), 1)


@pytest.mark.parametrize(("last", "is_right"), [(9, True), (3, False)])
def test_behind_a_doubt_the_rest_is_compared_with_a_reference_of_its_own(last, is_right):
    rest = Reply((Token(9, -0.4, 9, 1.0),), "z", "length")
    asked = Asked({QUESTION: REFERENCE, REST: rest})
    answer = replace(RIGHT, tokens=(Token(5, -0.1), Token(8, -0.2), Token(last, -0.4)), text="xyz")
    found, verdict = judged(asked, Outcome(CASE, 200, (answer,)))
    assert (not found) is is_right and verdict.partings == 1
    assert asked.questions == [QUESTION, REST]


def test_a_question_is_asked_once_and_chats_are_asked_by_their_tokens():
    asked = Asked({QUESTION: REFERENCE})
    checker = Judge(asked.ask, asked.tokenize, BOUND)
    text = replace(RIGHT, tokens=None)
    for case, answer in (
        (CASE, RIGHT),
        (replace(CASE, endpoint=COMPLETIONS), RIGHT),
        (Case(1, "chat", CHAT, message="hi", new_tokens=3), text),
    ):
        assert asyncio.run(checker.add(Outcome(case, 200, (answer,)))) == []
    assert asked.questions == [QUESTION] and checker.verdict.answers == 3
    wrong = replace(RIGHT, tokens=(*RIGHT.tokens[:2], Token(8)))
    assert asyncio.run(checker.add(Outcome(CASE, 200, (wrong,))))
    ((outcome, fault),) = checker.mismatches
    assert outcome.answers == (wrong,) and "token 2" in fault


def test_a_text_without_tokens_is_not_compared_behind_a_near_tie():
    found, verdict = judged(Asked({QUESTION: REFERENCE}), Outcome(CASE, 200, (replace(RIGHT, tokens=None, text="abd"),)))
    assert found == [] and (verdict.uncompared, verdict.partings) == (1, 0)


def test_each_continuation_is_held_against_its_own_prompt():
    other = Question((1, 2), 3)
    case = replace(CASE, prompts=(PROMPT, other.prompt_ids), n=2)
    asked = Asked({QUESTION: REFERENCE, other: REFERENCE})
    assert judged(asked, Outcome(case, 200, (RIGHT,) * 4))[0] == []
    assert asked.questions == [QUESTION, other]
