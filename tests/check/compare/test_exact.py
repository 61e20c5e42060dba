"""How far answers are from exact arithmetic."""

import pytest
import torch

from sglang_dsv4.check.bound import spread_of
from sglang_dsv4.check.checkpoint import ready_checkpoint, shaped_spec
from sglang_dsv4.check.compare.exact import exact_differences, expect_of_checkpoint
from sglang_dsv4.check.compare.questions import make_questions
from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.check.reply import Reply, Token


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return ready_checkpoint(tmp_path_factory.mktemp("exact") / "tiny", shaped_spec("tiny", (0, 4)))


def answers_of(oracle, questions, dtype, shift=0):
    """What a server of this arithmetic says; ``shift`` takes log-probabilities from a wrong position."""
    found = []
    for question in questions:
        ids = (*question.prompt_ids, *range(20, 20 + question.new_tokens))
        rows = oracle.logprobs(ids, dtype=dtype)[len(question.prompt_ids) - 1 - shift :]
        chosen = zip(ids[len(question.prompt_ids) :], rows, strict=False)
        found.append(Reply(tuple(Token(i, float(row[i]), i) for i, row in chosen)))
    return found


def test_exact_answers_are_exact_rounded_ones_are_not_and_wrong_ones_are_far_away(checkpoint):
    oracle, questions = Oracle(checkpoint), make_questions(4, 40, 0)

    def spread(dtype, shift=0):
        answers = answers_of(oracle, questions, dtype, shift)
        differences = exact_differences(checkpoint, questions, answers, 4)
        assert len(differences) == sum(question.new_tokens for question in questions)
        return spread_of(differences)

    # The same arithmetic on a prefix of another length: some ulps of logits below 16.
    assert spread(torch.float32).largest < 1e-4
    rounded, wrong = spread(torch.bfloat16), spread(torch.float32, shift=1)
    assert 1e-3 < rounded.typical < rounded.largest
    assert wrong.typical > 5 * rounded.typical


def test_answers_of_another_model_give_no_bound(checkpoint, tmp_path):
    oracle, questions = Oracle(checkpoint), make_questions(4, 40, 0)
    answers = answers_of(oracle, questions, torch.bfloat16)
    other = ready_checkpoint(tmp_path / "tiny", shaped_spec("tiny", (0, 128)))
    expect_of_checkpoint(spread_of(exact_differences(checkpoint, questions, answers, 4)), answers, checkpoint)
    with pytest.raises(ValueError, match="expected the model that answered"):
        expect_of_checkpoint(spread_of(exact_differences(other, questions, answers, 4)), answers, other)


@pytest.mark.gpu
def test_a_gpu_computes_the_same(checkpoint):
    """fp32 without TF32: sums in another order, some ulps of logits below 16."""
    questions = make_questions(4, 40, 0)
    answers = answers_of(Oracle(checkpoint), questions, torch.float32)
    differences = exact_differences(checkpoint, questions, answers, 4, "cuda")
    assert spread_of(differences).largest < 1e-4


def test_only_some_answers_are_computed(checkpoint):
    oracle, questions = Oracle(checkpoint), make_questions(6, 10, 0)
    answers = answers_of(oracle, questions, torch.float32)
    some = exact_differences(checkpoint, questions, answers, 3)
    assert len(some) == sum(question.new_tokens for question in questions[::2])


def test_questions_that_leave_entries_out_are_refused(checkpoint):
    questions = make_questions(1, 9, 0)
    answers = [Reply((Token(1, 0.0, 1),) * 1024)]
    with pytest.raises(ValueError, match="expected a prompt and answer of at most 1024 tokens"):
        exact_differences(checkpoint, questions, answers, 1)
