"""Whether answers are right. Pure functions over tensors; no server and no model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from sglang_dsv4.check.demo.answers import Answer


@dataclass(frozen=True)
class Comparison:
    """One answer against what it should have been.

    Attributes:
        answer (Answer): what came.
        expected (torch.Tensor): ``[len(answer.output_ids), vocab_size]`` fp32 log-probabilities.
    """

    answer: Answer
    expected: torch.Tensor


@dataclass(frozen=True)
class Standard:
    """What answers are compared with.

    Attributes:
        name (str): which oracle.
        comparisons (tuple[Comparison, ...]): one per answer.
        bound (float): largest allowed difference of any log-probability.
        control_name (str): a fault that was planted in the oracle.
        control_error (float): how far that fault moved the expected log-probabilities.
    """

    name: str
    comparisons: tuple[Comparison, ...]
    bound: float
    control_name: str
    control_error: float


def largest_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ or either has a value that is not finite."""
    if left.shape != right.shape or not (left.isfinite().all() and right.isfinite().all()):
        return float("inf")
    return (left - right).abs().max().item() if left.numel() else 0.0


def judge(standard: Standard) -> list[str]:
    """Everything wrong by one standard; empty if all is right."""
    faults = [fault for item in standard.comparisons for fault in compare(item, standard)]
    if not standard.control_error > standard.bound:
        faults.append(
            f"{standard.name}: the control ({standard.control_name}) differs by {standard.control_error:.2e}, which the "
            f"bound {standard.bound:.2e} does not notice; the comparison proves nothing"
        )
    return faults


def compare(item: Comparison, standard: Standard) -> list[str]:
    """What is wrong with one answer: a log-probability out of bounds, or another token where there was no doubt."""
    name = f"{item.answer.name} ({standard.name})"
    error = largest_difference(item.answer.logprobs, item.expected)
    if not error <= standard.bound:
        return [f"{name}: a log-probability is off by {error:.2e}, allowed {standard.bound:.2e}"]
    best, second = item.expected.topk(2, dim=1).values.unbind(dim=1)
    certain = (best - second) > standard.bound
    taken = torch.tensor(item.answer.output_ids)
    wrong = (certain & (taken != item.expected.argmax(dim=1))).nonzero().flatten().tolist()
    return [
        f"{name}: generated token {index} is {item.answer.output_ids[index]}, expected "
        f"{int(item.expected[index].argmax())}, which is ahead by {(best - second)[index].item():.2e}"
        for index in wrong
    ]


def check_lengths(answers: Iterable[Answer], new_tokens: int) -> list[str]:
    """Answers that are not as long as was asked."""
    return [
        f"{answer.name}: expected {new_tokens} generated tokens, got {len(answer.output_ids)}"
        for answer in answers
        if len(answer.output_ids) != new_tokens
    ]


def check_prefix_hits(answers: Sequence[Answer], min_cached_tokens: Sequence[int]) -> list[str]:
    """Answers for which the prefix cache served less than it must, or more than there was."""
    faults = []
    for answer, minimum in zip(answers, min_cached_tokens, strict=True):
        if not minimum <= answer.cached_tokens < len(answer.prompt_ids):
            faults.append(
                f"{answer.name}: expected {minimum} .. {len(answer.prompt_ids) - 1} tokens from the prefix cache, "
                f"got {answer.cached_tokens}"
            )
    return faults


def check_proof(log_line: str | None, facts: dict[str, object] | None) -> list[str]:
    """Whether the server proved that this cache was the one running."""
    faults = []
    if log_line is None:
        faults.append("the server's log has no line that says `sglang_dsv4 active:`")
    if facts is None:
        faults.append("/server_info says nothing about sglang_dsv4")
    return faults
