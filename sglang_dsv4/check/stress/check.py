"""Whether an answer is what the same request gives alone on a cold cache. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_dsv4.check.stress.answers import Answer, Outcome

# A character of which not all bytes have come; what follows may complete it.
_INCOMPLETE = "\ufffd"
NO_FINISH = (None, "abort")


@dataclass(frozen=True)
class Reference:
    """A request alone on a cold cache.

    Attributes:
        prompt_ids (tuple[int, ...]): what was asked.
        token_ids (tuple[int, ...]): generated.
        logprobs (tuple[float, ...]): of each token.
        margins (tuple[float, ...]): by how much each was ahead of the second best.
        text (str): the tokens, up to a stop string.
        finish (str): ``"length"`` or ``"stop"``.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]
    text: str
    finish: str


@dataclass(frozen=True)
class Verdict:
    """What one comparison found.

    Attributes:
        faults (tuple[str, ...]): everything wrong.
        compared (int): tokens that were compared.
        largest (float): largest difference of a log-probability.
        doubt (int | None): the first token that differs where the two best are too close to tell; nothing from there on
            was compared.
    """

    faults: tuple[str, ...] = ()
    compared: int = 0
    largest: float = 0.0
    doubt: int | None = None


def read_reference(prompt_ids: Sequence[int], reply: dict[str, Any]) -> Reference:
    """Read a reply of ``/generate`` that has the two best log-probabilities of each token.

    Raises:
        ValueError: it has not, or was served from a cache that was not cold.
    """
    meta = reply["meta_info"]
    chosen, best = meta["output_token_logprobs"], meta.get("output_top_logprobs")
    if best is None or len(best) != len(chosen) or any(len(row) < 2 for row in best):
        raise ValueError(f"reference: expected the two best log-probabilities of {len(chosen)} tokens")
    if meta["cached_tokens"] != 0:
        raise ValueError(f"reference: expected a cold cache, got {meta['cached_tokens']} tokens from it")
    return Reference(
        tuple(prompt_ids),
        tuple(int(token_id) for _, token_id, *_ in chosen),
        tuple(float(value) for value, *_ in chosen),
        tuple(float(row[0][0] - row[1][0]) for row in best),
        reply["text"],
        meta["finish_reason"]["type"],
    )


def judge(answer: Answer, reference: Reference, bound: float, *, is_whole: bool) -> Verdict:
    """Compare one answer with its reference.

    Two runs that are both right differ by at most ``bound`` in any log-probability. So the best token may change only
    where it is ahead of the second by no more than twice that.

    Args:
        answer (Answer): what came.
        reference (Reference): the same request alone.
        bound (float): largest allowed difference of a log-probability.
        is_whole (bool): False: the client left or aborted, and the answer may be any beginning.
    """
    faults = []
    if is_whole and answer.finish in NO_FINISH:
        faults.append(f"the answer has no end: expected {reference.finish}, got {answer.finish}")
    if answer.token_ids is None:
        return _judge_text(answer, reference, bound, faults)
    ids, expected = answer.token_ids, reference.token_ids
    compared, largest = 0, 0.0
    for index, (token_id, right) in enumerate(zip(ids, expected, strict=False)):
        if token_id != right:
            if reference.margins[index] <= 2 * bound:
                return Verdict(tuple(faults), compared, largest, doubt=index)
            faults.append(
                f"generated token {index} is {token_id}, expected {right}, which is ahead by {reference.margins[index]:.2e}"
            )
            return Verdict(tuple(faults), compared, largest)
        compared += 1
        value = None if answer.logprobs is None else answer.logprobs[index]
        if value is not None:
            error = abs(value - reference.logprobs[index])
            if not error <= bound:
                faults.append(f"the log-probability of generated token {index} is off by {error:.2e}, allowed {bound:.2e}")
                return Verdict(tuple(faults), compared, largest)
            largest = max(largest, error)
    if len(ids) > len(expected) or (is_whole and len(ids) < len(expected)):
        faults.append(f"expected {len(expected)} generated tokens, got {len(ids)}")
    elif is_whole and answer.text != reference.text:
        faults.append(f"expected the text {reference.text!r}, got {answer.text!r}")
    elif not is_whole and not reference.text.startswith(answer.text.rstrip(_INCOMPLETE)):
        faults.append(f"expected a beginning of the text {reference.text!r}, got {answer.text!r}")
    elif is_whole and answer.finish != reference.finish:
        faults.append(f"expected the end {reference.finish}, got {answer.finish}")
    return Verdict(tuple(faults), compared, largest)


def judge_outcome(outcome: Outcome) -> list[str]:
    """What is wrong with an outcome before any answer is compared."""
    case, faults = outcome.case, list(outcome.faults)
    if case.invalid is not None:
        if not 400 <= outcome.status < 500:
            faults.append(f"expected the body to be refused, got status {outcome.status}")
        return faults
    if faults:
        return faults
    if outcome.status != 200:
        return [f"expected status 200, got {outcome.status}"]
    if len(outcome.answers) != case.num_answers:
        faults.append(f"expected {case.num_answers} answers, got {len(outcome.answers)}")
    return faults


def _judge_text(answer: Answer, reference: Reference, bound: float, faults: list[str]) -> Verdict:
    """Without token ids there is no telling which token differs; a doubt anywhere excuses another text."""
    if answer.text != reference.text:
        doubtful = [i for i, margin in enumerate(reference.margins) if margin <= 2 * bound]
        if doubtful:
            return Verdict(tuple(faults), doubt=doubtful[0])
        faults.append(f"expected the text {reference.text!r}, got {answer.text!r}")
    elif answer.finish not in NO_FINISH and answer.finish != reference.finish:
        faults.append(f"expected the end {reference.finish}, got {answer.finish}")
    return Verdict(tuple(faults), compared=len(reference.token_ids))
