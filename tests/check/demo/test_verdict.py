"""The verdict: right answers pass, and each kind of wrong one fails on its own."""

from dataclasses import replace

import pytest
import torch

from sglang_dsv4.check.demo.answers import Answer
from sglang_dsv4.check.demo.verdict import (
    Comparison,
    Standard,
    check_lengths,
    check_prefix_hits,
    check_proof,
    compare,
    judge,
    largest_difference,
)

VOCAB = 11
BOUND = 1e-3


def make_expected() -> torch.Tensor:
    """``[4, VOCAB]``: token 3 is ahead everywhere, by 1 except in row 2, where token 5 is as good."""
    logits = torch.zeros(4, VOCAB)
    logits[:, 3] = 2.0
    logits[:, 5] = 1.0
    logits[2, 5] = 2.0 - BOUND / 2
    return logits.log_softmax(dim=1)


def make_answer(**change: object) -> Answer:
    answer = Answer("one", (8, 9, 10), (3, 3, 3, 3), make_expected() + BOUND / 2, 0, "text", 0.1)
    return replace(answer, **change)


def make_standard(answer: Answer, **change: object) -> Standard:
    comparison = Comparison(answer, make_expected())
    return replace(Standard("exact", (comparison,), BOUND, "a fault", 10 * BOUND), **change)


def spoiled(row: int, token: int, by: float) -> torch.Tensor:
    logprobs = make_expected()
    logprobs[row, token] += by
    return logprobs


def test_right_answers_pass():
    assert judge(make_standard(make_answer())) == []


@pytest.mark.parametrize("by", [-2 * BOUND, 2 * BOUND, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 3])
def test_one_wrong_logprob_fails(row: int, by: float):
    (fault,) = judge(make_standard(make_answer(logprobs=spoiled(row, 7, by))))
    assert fault.startswith("one (exact): a log-probability is off by")


def test_a_logprob_within_the_bound_passes():
    assert judge(make_standard(make_answer(logprobs=spoiled(0, 7, 0.9 * BOUND)))) == []


def test_one_wrong_token_fails():
    (fault,) = judge(make_standard(make_answer(output_ids=(3, 5, 3, 3))))
    assert fault.startswith("one (exact): generated token 1 is 5, expected 3")


def test_a_token_in_doubt_may_be_either():
    assert judge(make_standard(make_answer(output_ids=(3, 3, 5, 3)))) == []


def test_too_few_logprobs_fail():
    answer = make_answer(logprobs=make_expected()[:3])
    assert compare(Comparison(answer, make_expected()), make_standard(answer)) != []


@pytest.mark.parametrize("error", [0.0, BOUND, float("nan")])
def test_a_control_that_is_not_noticed_fails(error: float):
    (fault,) = judge(make_standard(make_answer(), control_error=error))
    assert "proves nothing" in fault


@pytest.mark.parametrize(
    ("cached", "minimum", "is_right"), [(0, 0, True), (2, 2, True), (2, 1, True), (1, 2, False), (0, 2, False), (3, 2, False)]
)
def test_prefix_hits(cached: int, minimum: int, is_right: bool):
    """At least what must be; never the whole prompt, whose last token has to be computed."""
    faults = check_prefix_hits([make_answer(cached_tokens=cached)], [minimum])
    assert (faults == []) is is_right


def test_a_short_answer_fails():
    assert check_lengths([make_answer()], 4) == []
    assert check_lengths([make_answer()], 5) == ["one: expected 5 generated tokens, got 4"]


def test_a_server_without_our_cache_fails():
    assert check_proof("sglang_dsv4 active: yes", {"version": "0"}) == []
    assert len(check_proof(None, {"version": "0"})) == 1
    assert len(check_proof("sglang_dsv4 active: yes", None)) == 1


def test_largest_difference():
    left = torch.zeros(2, 3)
    assert largest_difference(left, left + 0.25) == 0.25
    assert largest_difference(left, torch.zeros(2, 4)) == float("inf")
    assert largest_difference(left, torch.full((2, 3), float("nan"))) == float("inf")


def test_positions_of_generated_tokens():
    """The token after prompt position 2 is the first generated; the last one is never read."""
    answer = make_answer()
    assert answer.token_ids == (8, 9, 10, 3, 3, 3)
    assert list(range(6))[answer.generated] == [2, 3, 4, 5]
