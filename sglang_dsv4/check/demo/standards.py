"""What the oracle expects, how far a right server may be from it, and the control that proves the difference shows."""

from collections.abc import Callable, Sequence

import torch

from sglang_dsv4.check.demo.answers import Answer
from sglang_dsv4.check.demo.verdict import Comparison, Standard, largest_difference
from sglang_dsv4.check.faults import DroppedBStream, Fault, SwappedStreams
from sglang_dsv4.check.oracle import Oracle, comparison_bound
from sglang_dsv4.spec import CSA_RATIO


def build_standards(
    oracle: Oracle, answers: Sequence[Answer], *, dtype: torch.dtype, row_format: str, step: Callable[[], None] = lambda: None
) -> list[Standard]:
    """One standard, or for an fp32 server two.

    Exact rows: the oracle as it is; the bound is what the row format and ``dtype`` cost the same model. With fp8 rows
    that is a lot. Rows as the server's, for fp32 servers: the oracle rounds its rows as the server does, and what is
    left is the order of fp32 arithmetic, so that one wrong entry among many shows.

    Args:
        oracle (Oracle): of the checkpoint that was served.
        answers (Sequence[Answer]): the server's.
        dtype (torch.dtype): of the server's arithmetic.
        row_format (str): of the server's cache.
        step (Callable[[], None]): called ``num_steps(...)`` times on the way.
    """
    standards = [_exact_rows(oracle, answers, dtype, row_format, step)]
    if dtype is torch.float32:
        standards.append(_rounded_rows(oracle, answers, row_format, step))
    return standards


def num_steps(answers: Sequence[Answer], dtype: torch.dtype) -> int:
    """How often `build_standards` calls ``step``."""
    return len(answers) * (2 if dtype is torch.float32 else 1)


def _exact_rows(
    oracle: Oracle, answers: Sequence[Answer], dtype: torch.dtype, row_format: str, step: Callable[[], None]
) -> Standard:
    comparisons, rounding, arithmetic = [], 0.0, 0.0
    for answer in answers:
        comparisons.append(Comparison(answer, oracle.logprobs(answer.token_ids)[answer.generated]))
        rounding = max(rounding, _largest(oracle.rounding_error(answer.token_ids, dtype, row_format), answer))
        arithmetic = max(arithmetic, _largest(oracle.arithmetic_error(answer.token_ids), answer))
        step()
    return Standard(
        name="exact rows",
        comparisons=tuple(comparisons),
        bound=comparison_bound(rounding, arithmetic),
        control_name="the two streams of CSA layers swapped",
        control_error=_control_error(oracle, answers, SwappedStreams(), None),
    )


def _rounded_rows(oracle: Oracle, answers: Sequence[Answer], row_format: str, step: Callable[[], None]) -> Standard:
    comparisons, arithmetic = [], 0.0
    for answer in answers:
        expected = oracle.logprobs(answer.token_ids, row_format=row_format)
        comparisons.append(Comparison(answer, expected[answer.generated]))
        arithmetic = max(arithmetic, _largest(oracle.arithmetic_error(answer.token_ids, row_format), answer))
        step()
    hits = [answer for answer in answers if answer.cached_tokens]
    error = max(
        (_control_error(oracle, [hit], DroppedBStream(hit.cached_tokens // CSA_RATIO), row_format) for hit in hits), default=0.0
    )
    return Standard(
        name=f"rows as {row_format}",
        comparisons=tuple(comparisons),
        bound=comparison_bound(0.0, arithmetic),
        control_name="after a prefix hit, the first CSA entry without the block before it",
        control_error=error,
    )


def _control_error(oracle: Oracle, answers: Sequence[Answer], fault: Fault, row_format: str | None) -> float:
    """How far ``fault`` moves the log-probabilities of the longest answer."""
    answer = _longest(answers)
    right = oracle.logprobs(answer.token_ids, row_format=row_format)[answer.generated]
    wrong = oracle.logprobs(answer.token_ids, row_format=row_format, fault=fault)[answer.generated]
    return largest_difference(wrong, right)


def _longest(answers: Sequence[Answer]) -> Answer:
    return max(answers, key=lambda answer: len(answer.token_ids))


def _largest(errors: torch.Tensor, answer: Answer) -> float:
    return errors[answer.generated].max().item()
