"""What the judge lets pass, what it does not, and how far apart right answers may be."""

import asyncio
from dataclasses import replace

import pytest
import torch

from sglang_dsv4.check.bound import Spread, backend_bound, moved, own_rounding, served_bound, spread_of
from sglang_dsv4.check.judge import Verdict, compare_distributions, compare_reply, compare_tokens, judge, largest_difference
from sglang_dsv4.check.reply import Question, Reply, Token, tokens_along

BOUND = 0.1
PROMPT = (9, 10, 11)


def reply(*tokens, **fields):
    """Of ``(token_id, logprob, best_id, margin)`` each."""
    return Reply(tuple(Token(*token) for token in tokens), **fields)


RIGHT = reply((1, -0.5, 1, 0.9), (2, -1.0, 2, 0.05), (3, -0.2, 3, 2.0), text="abc", finish="length")


def changed(index, **fields):
    """The right answer with one token changed."""
    tokens = list(RIGHT.tokens)
    tokens[index] = tokens[index]._replace(**fields)
    return replace(RIGHT, tokens=tuple(tokens))


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (changed(0, logprob=-0.5 - 0.9 * BOUND), None),
        (changed(0, logprob=-0.5 - 1.1 * BOUND), "token 0: log-probability -0.6100, expected -0.5000"),
        (changed(2, logprob=float("nan")), "token 2: log-probability nan"),
        (changed(2, logprob=None), None),
        (changed(0, token_id=7), "token 0: expected 1, which is ahead by 0.9, got 7"),
        (changed(2, token_id=7), "token 2: expected 3, which is ahead by 2, got 7"),
        (changed(1, token_id=7), None),
    ],
)
def test_log_probabilities_are_within_the_bound_and_certain_tokens_the_same(got, message):
    found = compare_tokens(RIGHT.tokens, got.tokens, BOUND)
    assert found.faults == () if message is None else message in found.faults[0]


def test_tokens_may_differ_only_where_the_two_best_may_change_places():
    """Each of two log-probabilities moves by at most the bound."""
    other = changed(1, token_id=7)
    found = compare_tokens(RIGHT.tokens, other.tokens, BOUND)
    assert (found.parting, found.tokens, found.certain) == (1, 1, 1)
    for margin, is_fault in ((1.9 * BOUND, False), (2.1 * BOUND, True)):
        assert bool(compare_tokens(changed(1, margin=margin).tokens, other.tokens, BOUND).faults) is is_fault


TEXT = replace(RIGHT, tokens=None)
CERTAIN = changed(1, margin=1.0)


@pytest.mark.parametrize(
    ("got", "reference", "is_whole", "message"),
    [
        (RIGHT, RIGHT, True, None),
        (replace(RIGHT, tokens=RIGHT.tokens[:2]), RIGHT, True, "expected 3 generated tokens, got 2"),
        (replace(RIGHT, tokens=(*RIGHT.tokens, Token(8))), RIGHT, True, "expected 3 generated tokens, got 4"),
        (replace(RIGHT, text="ab"), RIGHT, True, "expected the text 'abc', got 'ab'"),
        (replace(RIGHT, finish=None), RIGHT, True, "has no end"),
        (replace(RIGHT, finish="abort"), RIGHT, True, "has no end"),
        (replace(RIGHT, finish="stop"), RIGHT, True, "expected the end length, got stop"),
        (TEXT, CERTAIN, True, None),
        (replace(TEXT, finish=None), CERTAIN, True, "has no end"),
        (replace(TEXT, finish="stop"), CERTAIN, True, "expected the end length, got stop"),
        (replace(TEXT, text="abd"), CERTAIN, True, "expected the text 'abc', got 'abd'"),
        # The client left, or aborted: any beginning.
        (replace(RIGHT, finish=None, text="ab", tokens=RIGHT.tokens[:2]), RIGHT, False, None),
        (replace(RIGHT, finish=None, text="a\ufffd", tokens=RIGHT.tokens[:2]), RIGHT, False, None),
        (replace(RIGHT, finish=None, text="b", tokens=RIGHT.tokens[:2]), RIGHT, False, "expected a beginning of the text"),
        (replace(RIGHT, finish=None, text="a", tokens=changed(0, token_id=7).tokens[:1]), RIGHT, False, "token 0"),
        (replace(RIGHT, finish=None, text="", tokens=()), RIGHT, False, None),
    ],
)
def test_length_text_and_end(got, reference, is_whole, message):
    found = compare_reply(got, reference, BOUND, is_whole=is_whole)
    assert found.faults == () if message is None else message in found.faults[0]


def test_another_text_without_tokens_passes_only_behind_a_near_tie():
    assert compare_reply(replace(TEXT, text="abd"), RIGHT, BOUND, is_whole=True).parting == 1


def judged(got, scored=None, *, can_score=True):
    """The verdict on one answer; ``scored`` is what the reference says along its tokens, asked for where they part."""

    async def score(prompt_ids, token_ids):
        assert (prompt_ids, token_ids) == (PROMPT, got.token_ids) and scored is not None
        return list(scored.tokens)

    verdict = Verdict()
    asyncio.run(judge(verdict, "x", Question(PROMPT, 3), RIGHT, got, BOUND, score if can_score else None))
    return verdict


def test_equal_answers_pass_and_are_counted():
    verdict = judged(reply((1, -0.53, 1, 0.9), (2, -1.0, 2, 0.01), (3, -0.16, 3, 2.0)))
    assert not verdict.faults
    assert (verdict.identical, verdict.partings, verdict.tokens, verdict.certain) == (1, 0, 3, 2)
    assert verdict.largest == pytest.approx(0.04)
    assert verdict.typical == pytest.approx((0.03**2 + 0.04**2) ** 0.5 / 3**0.5)
    assert judged(reply((1, -0.5, 1, 0.9))).faults == ["x: expected 3 tokens, got 1"]


def test_what_follows_another_token_at_a_near_tie_is_scored():
    got = reply((1, -0.5, 1, 0.9), (7, -1.02, 7, 0.02), (8, -0.3, 8, 1.0))
    along = reply((1, -0.5, 1, 0.9), (7, -1.05, 2, 0.05), (8, -0.35, 8, 1.0))
    verdict = judged(got, along)
    assert not verdict.faults
    assert (verdict.identical, verdict.partings, verdict.tokens) == (0, 1, 3)
    # The twin: behind the parting the reference is sure of another token.
    astray = reply(*along.tokens[:2], (8, -1.35, 5, 1.0))
    faults = judged(got, astray).faults
    assert len(faults) == 2 and all(fault.startswith("x: token 2") for fault in faults)
    # Where they part, the reference's own choice counts, not what it scored.
    wrong = reply((7, -1.4, 7, 0.1), *RIGHT.tokens[1:])
    (fault,) = judged(wrong, reply((7, -1.4, 7, 0.9), *RIGHT.tokens[1:])).faults
    assert fault == "x: token 0: expected 1, which is ahead by 0.9, got 7"


def test_without_scores_answers_are_compared_up_to_where_they_part():
    verdict = judged(reply((1, -0.55, 1, 0.9), (7, -1.02, 7, 0.02), (8, -9.0, 8, 1.0)), can_score=False)
    assert not verdict.faults and verdict.largest == pytest.approx(0.05)
    assert (verdict.partings, verdict.tokens, verdict.uncompared) == (1, 1, 2)
    verdict = judged(reply((5, -0.5, 5, 0.9), *RIGHT.tokens[1:]), can_score=False)
    assert len(verdict.faults) == 1 and (verdict.tokens, verdict.uncompared) == (0, 3)


def expected_rows():
    """``[4, 11]``: token 3 is ahead everywhere, by 1 except in row 2, where token 5 is as good."""
    logits = torch.zeros(4, 11)
    logits[:, 3], logits[:, 5], logits[2, 5] = 2.0, 1.0, 2.0 - BOUND / 2
    return logits.log_softmax(dim=1)


def answer(ids=(3, 3, 3, 3), rows=None):
    rows = expected_rows() + BOUND / 2 if rows is None else rows
    return Reply(tokens_along(rows, ids[: len(rows)]), distributions=rows)


def spoiled(row, by):
    rows = expected_rows()
    rows[row, 7] += by
    return rows


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (answer(), None),
        (answer((3, 3, 5, 3)), None),
        (answer((3, 5, 3, 3)), "token 1: expected 3"),
        (answer(rows=spoiled(0, 0.9 * BOUND)), None),
        (replace(answer(), distributions=None), "off by inf"),
        (answer(rows=expected_rows()[:3]), "off by inf"),
        *((answer(rows=spoiled(row, by)), "off by") for row in (0, 3) for by in (-2 * BOUND, 2 * BOUND, float("nan"))),
        *((answer(rows=spoiled(0, by)), "off by inf") for by in (float("inf"), -float("inf"))),
    ],
)
def test_every_log_probability_of_the_vocabulary_is_compared(got, message):
    faults = compare_distributions(got, expected_rows(), BOUND).faults
    assert faults == () if message is None else message in faults[0]


def test_largest_difference():
    left = torch.zeros(2, 3)
    assert largest_difference(left, left + 0.25) == 0.25
    assert largest_difference(left, torch.zeros(2, 4)) == float("inf")
    assert largest_difference(left, torch.full((2, 3), float("nan"))) == float("inf")


MOVED = reply((1, -0.5, 1, 0.9), (2, -1.06, 2, 0.05), (3, -0.2, 3, 2.0))


def test_own_rounding_is_the_largest_difference_of_any_way_up_to_where_ways_part():
    parted = reply((1, -0.52, 1, 0.9), (5, -9.0, 5, 0.05), (3, -9.0, 3, 2.0))
    assert moved(RIGHT.tokens, parted.tokens) == pytest.approx([0.02])
    assert own_rounding([[RIGHT], [parted]], {}).largest == pytest.approx(0.02)
    assert own_rounding([[RIGHT], [parted]], {0: list(MOVED.tokens)}).largest == pytest.approx(0.06)
    assert spread_of([]) == Spread() and spread_of([-3.0, 4.0]) == Spread(4.0, 12.5**0.5)


def test_a_bound_is_twice_the_reference_s_distance_from_itself_or_from_exact_arithmetic():
    reference, ours = [[RIGHT], [MOVED]], [[RIGHT]]
    alone = backend_bound(reference, ours, None, {}, Spread())
    assert alone["bound"] == pytest.approx(0.12)
    assert alone["typical_bound"] == pytest.approx(2 * 0.06 / 3**0.5)
    exact = backend_bound(reference, ours, None, {}, Spread(0.2, 0.01))
    assert exact["bound"] == pytest.approx(0.4) and exact["typical_bound"] == alone["typical_bound"]
    rows = backend_bound(reference, ours, [[MOVED]], {}, Spread())
    assert rows["bound"] == pytest.approx(0.24)
    assert rows["typical_bound"] == pytest.approx(2 * alone["typical_bound"])


@pytest.mark.parametrize(("off", "expected"), [(0.003, 0.012), (0.0, 0.0)])
def test_a_server_elsewhere_is_measured_by_scoring_its_tokens(off, expected):
    async def score(prompt_ids, token_ids):
        assert (prompt_ids, token_ids) == (PROMPT, (1, 2, 3))
        return changed(1, logprob=-1.0 + off).tokens

    bound = asyncio.run(served_bound([(PROMPT, RIGHT)] * 2, score))
    assert bound == pytest.approx(expected)
