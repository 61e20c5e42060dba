"""What the oracle expects, how far a right server may be from it, and the control that proves the difference shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_dsv4.check.bound import comparison_bound
from sglang_dsv4.check.demo.workload import Answer
from sglang_dsv4.check.faults import DroppedBStream, Fault, SwappedStreams
from sglang_dsv4.check.judge import compare_distributions, largest_difference
from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.spec import CSA_RATIO


@dataclass(frozen=True)
class Standard:
    """What answers are compared with.

    Attributes:
        name (str): which oracle.
        comparisons (tuple[tuple[Answer, torch.Tensor], ...]): answers, each with the expected log-probabilities
            ``[new_tokens, vocab_size]``, fp32.
        bound (float): largest allowed difference of any log-probability.
        control_name (str): a fault that was planted in the oracle.
        control_error (float): how far that fault moved the expected log-probabilities.
    """

    name: str
    comparisons: tuple[tuple[Answer, torch.Tensor], ...]
    bound: float
    control_name: str
    control_error: float

    @property
    def largest(self) -> float:
        """Largest difference of a log-probability."""
        return max(largest_difference(answer.distributions, expected) for answer, expected in self.comparisons)

    def faults(self) -> list[str]:
        """Everything wrong by this standard; empty if all is right."""
        faults = [
            f"{answer.name} ({self.name}): {fault}"
            for answer, expected in self.comparisons
            for fault in compare_distributions(answer.reply, expected, self.bound).faults
        ]
        if not self.control_error > self.bound:
            faults.append(
                f"{self.name}: the control ({self.control_name}) differs by {self.control_error:.2e}, which the bound "
                f"{self.bound:.2e} does not notice; the comparison proves nothing"
            )
        return faults


def build_standards(
    oracle: Oracle, answers: Sequence[Answer], *, dtype: torch.dtype, row_format: str, step: Callable[[], None] = lambda: None
) -> list[Standard]:
    """One standard, or two for an fp32 server.

    Exact rows: the oracle as it is; the bound is what the row format and ``dtype`` do to the same model. With fp8 rows that
    is a lot. Rows rounded as the server's, for fp32 servers: only the order of fp32 arithmetic remains, so that one wrong
    entry among many shows.

    Args:
        oracle (Oracle): of the checkpoint that was served.
        answers (Sequence[Answer]): the server's.
        dtype (torch.dtype): of the server's arithmetic.
        row_format (str): of the server's cache.
        step (Callable[[], None]): called ``num_steps(...)`` times on the way.
    """
    longest = max(answers, key=lambda answer: len(answer.token_ids))
    standards = [
        Standard(
            name="exact rows",
            comparisons=_expected(oracle, answers, None, step),
            bound=comparison_bound(
                max(_largest(oracle.rounding_error(answer.token_ids, dtype, row_format), answer) for answer in answers),
                max(_largest(oracle.arithmetic_error(answer.token_ids), answer) for answer in answers),
            ),
            control_name="the two streams of CSA layers swapped",
            control_error=_control_error(oracle, longest, SwappedStreams(), None),
        )
    ]
    if dtype is torch.float32:
        hits = [answer for answer in answers if answer.reply.cached_tokens]
        errors = [_control_error(oracle, hit, DroppedBStream(hit.reply.cached_tokens // CSA_RATIO), row_format) for hit in hits]
        rounded = Standard(
            name=f"rows as {row_format}",
            comparisons=_expected(oracle, answers, row_format, step),
            bound=comparison_bound(
                0.0, max(_largest(oracle.arithmetic_error(answer.token_ids, row_format), answer) for answer in answers)
            ),
            control_name="after a prefix hit, the first CSA entry without the block before it",
            control_error=max(errors, default=0.0),
        )
        standards.append(rounded)
    return standards


def num_steps(answers: Sequence[Answer], dtype: torch.dtype) -> int:
    """How often `build_standards` calls ``step``."""
    return len(answers) * (2 if dtype is torch.float32 else 1)


def _expected(
    oracle: Oracle, answers: Sequence[Answer], row_format: str | None, step: Callable[[], None]
) -> tuple[tuple[Answer, torch.Tensor], ...]:
    pairs = []
    for answer in answers:
        pairs.append((answer, oracle.logprobs(answer.token_ids, row_format=row_format)[answer.generated]))
        step()
    return tuple(pairs)


def _control_error(oracle: Oracle, answer: Answer, fault: Fault, row_format: str | None) -> float:
    """How far ``fault`` moves the log-probabilities of an answer."""
    right = oracle.logprobs(answer.token_ids, row_format=row_format)[answer.generated]
    wrong = oracle.logprobs(answer.token_ids, row_format=row_format, fault=fault)[answer.generated]
    return largest_difference(wrong, right)


def _largest(errors: torch.Tensor, answer: Answer) -> float:
    return errors[answer.generated].max().item()
