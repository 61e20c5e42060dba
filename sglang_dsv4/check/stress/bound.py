"""How far two runs of a right server may be apart, and the control that proves that more would show."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from sglang_dsv4.check.demo.workload import PAGE_TOKENS
from sglang_dsv4.check.oracle import Oracle, comparison_bound
from sglang_dsv4.check.stress.answers import Answer, Outcome
from sglang_dsv4.check.stress.check import Reference
from sglang_dsv4.check.stress.summary import is_served

CONTROL_WIDTHS = (4, 32, PAGE_TOKENS)
ReadAgain = Callable[[Sequence[int], Sequence[int]], Awaitable[Sequence[float]]]


def measured_bound(checkpoint: Path, token_ids: Sequence[Sequence[int]], row_format: str) -> float:
    """The bound of a checkpoint, by its rounding errors on some sequences.

    Each of two runs is within `comparison_bound` of exact arithmetic over rows rounded alike; so the two are within
    twice that of each other.

    Args:
        checkpoint (Path): what is served, in fp32.
        token_ids (Sequence[Sequence[int]]): sequences like those that are compared.
        row_format (str): of the cache.
    """
    oracle = Oracle(checkpoint)
    errors = [oracle.arithmetic_error(tuple(ids), row_format).max().item() for ids in token_ids]
    return 2 * comparison_bound(0.0, max(errors))


async def served_bound(references: Sequence[Reference], read_again: ReadAgain) -> float:
    """The bound of a server whose checkpoint is not here, by its own rounding.

    Tokens that were decoded one by one are read once more in one prefill: the same numbers, added in another order, as in
    a batch with other requests. Other runs may differ by as much again, and both are maxima over a sample; so the factor is
    that of `comparison_bound`.

    Args:
        references (Sequence[Reference]): answers alone on a cold cache.
        read_again (ReadAgain): log-probabilities of tokens behind a prompt, from a prefill.
    """
    largest = 0.0
    for reference in references:
        values = await read_again(reference.prompt_ids, reference.token_ids)
        pairs = zip(values, reference.logprobs, strict=True)
        largest = max([largest, *(abs(value - decoded) for value, decoded in pairs)])
    return comparison_bound(0.0, largest)


def control_answer(outcomes: Sequence[Outcome]) -> tuple[Outcome, Answer] | None:
    """The answer by which a wrong prompt must show: the longest prompt whose tokens came, log-probabilities first."""
    found = [
        (outcome, answer)
        for outcome in outcomes
        for answer in outcome.answers
        if is_served(outcome) and answer.token_ids and not outcome.case.stop
    ]
    return max(found, key=lambda pair: (pair[1].logprobs is not None, pair[1].prompt_tokens), default=None)


def wrong_prompts(prompt_ids: Sequence[int], *, has_logprobs: bool) -> Iterator[tuple[tuple[int, ...], str]]:
    """Prompts with more and more other tokens, and in words where: one, an entry's, a page's, all.

    The first that is noticed says how fine the comparison is. With log-probabilities the tokens begin in the first quarter:
    a long prompt knows them through compressed entries only. Tokens alone may not change by that; then they are the last.
    """
    length = len(prompt_ids)
    for width in sorted({1, length, *(width for width in CONTROL_WIDTHS if width < length)}):
        last = length - width
        begin = min(length // 4, last) if has_logprobs else last
        others = (token_id ^ 1 for token_id in prompt_ids[begin : begin + width])
        where = f"with {width} of {length} tokens others, from {begin} on"
        yield (*prompt_ids[:begin], *others, *prompt_ids[begin + width :]), where
