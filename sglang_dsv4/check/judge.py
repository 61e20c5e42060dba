"""Whether answers are right, given how far apart right ones may be. Pure functions."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sglang_dsv4.check.bound import is_certain, spread_of
from sglang_dsv4.check.reply import Ids, Question, Reply, Token, tokens_along

Score = Callable[[Ids, Ids], Awaitable[list[Token]]]
# A character of which not all bytes have arrived; what follows may complete it.
_INCOMPLETE = "\ufffd"
NO_FINISH = (None, "abort")


@dataclass(frozen=True)
class Comparison:
    """What one comparison of an answer found.

    Attributes:
        faults (tuple[str, ...]): everything wrong.
        tokens (int): tokens that were compared.
        differences (tuple[float, ...]): of their log-probabilities, where both have one.
        certain (int): tokens that had to be the reference's.
        parting (int | None): the first token that is not the reference's; nothing from there on was compared.
    """

    faults: tuple[str, ...] = ()
    tokens: int = 0
    differences: tuple[float, ...] = ()
    certain: int = 0
    parting: int | None = None


@dataclass
class Verdict:
    """What a comparison of many answers found.

    Attributes:
        answers (int): compared.
        identical (int): with the reference's tokens to the end.
        tokens (int): compared; behind a parting, with scores of the reference's side.
        certain (int): tokens at which the reference's two best are so far apart that the answer must have the same.
        partings (int): answers that took another token at a near-tie.
        uncompared (int): what was not compared behind a parting: tokens that nobody scored, or texts without tokens.
        differences (list[float]): of log-probabilities.
        faults (list[str]): everything wrong.
    """

    answers: int = 0
    identical: int = 0
    tokens: int = 0
    certain: int = 0
    partings: int = 0
    uncompared: int = 0
    differences: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def largest(self) -> float:
        """Largest difference of a log-probability."""
        return spread_of(self.differences).largest

    @property
    def typical(self) -> float:
        """Root of their mean squared difference."""
        return spread_of(self.differences).typical

    def add(self, found: Comparison, name: str) -> None:
        """Count one comparison; ``name`` is the answer's, for faults."""
        self.tokens += found.tokens
        self.certain += found.certain
        self.differences += found.differences
        self.faults += [f"{name}: {fault}" for fault in found.faults]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the first ten faults."""
        counts = ("answers", "identical", "tokens", "certain", "partings", "uncompared", "largest", "typical")
        return {**{name: getattr(self, name) for name in counts}, "num_faults": len(self.faults), "faults": self.faults[:10]}


def compare_tokens(expected: Sequence[Token], got: Sequence[Token], bound: float) -> Comparison:
    """Compare tokens with those of a reference, up to where they part.

    A log-probability may differ by at most ``bound``, and where the reference is certain the token must be its best one.

    Args:
        expected (Sequence[Token]): with margins.
        got (Sequence[Token]): the answer's; a log-probability that is None is not compared.
        bound (float): largest difference of a log-probability between two right answers.
    """
    faults: list[str] = []
    differences: list[float] = []
    tokens = certain = 0
    parting = None
    for index, (right, token) in enumerate(zip(expected, got, strict=False)):
        if is_certain(right.margin, bound):
            certain += 1
            if token.token_id != right.best_id:
                faults.append(
                    f"token {index}: expected {right.best_id}, which is ahead by {right.margin:.3g}, got {token.token_id}"
                )
        if token.token_id != right.token_id:
            parting = index
            break
        tokens += 1
        if token.logprob is None or right.logprob is None:
            continue
        differences.append(abs(token.logprob - right.logprob))
        if not differences[-1] <= bound:
            faults.append(
                f"token {index}: log-probability {token.logprob:.4f}, expected {right.logprob:.4f}; "
                f"off by {differences[-1]:.2e}, allowed {bound:.2e}"
            )
    return Comparison(tuple(faults), tokens, tuple(differences), certain, parting)


def compare_reply(reply: Reply, reference: Reply, bound: float, *, is_whole: bool) -> Comparison:
    """Compare one answer with the same request alone: tokens, text and end. Only the first fault is reported.

    Args:
        reply (Reply): what came back.
        reference (Reply): the same request alone on a cold cache.
        bound (float): largest difference of a log-probability between two right answers.
        is_whole (bool): False: the client left or aborted, and the answer may be any beginning.
    """
    if is_whole and reply.finish in NO_FINISH:
        return Comparison((f"the answer has no end: expected {reference.finish}, got {reply.finish}",))
    expected = reference.tokens or ()
    if reply.tokens is None:
        return _compare_text(reply, reference, bound)
    found = compare_tokens(expected, reply.tokens, bound)
    fault = next(iter(found.faults), None)
    if fault is None and found.parting is None:
        fault = _wrong_end(reply, reference, is_whole)
    return replace(found, faults=() if fault is None else (fault,))


def _wrong_end(reply: Reply, reference: Reply, is_whole: bool) -> str | None:
    """What is wrong with the length, text or end of an answer whose tokens are the reference's."""
    count, wanted = len(reply.token_ids), len(reference.token_ids)
    if count > wanted or (is_whole and count < wanted):
        return f"expected {wanted} generated tokens, got {count}"
    if is_whole and reply.text != reference.text:
        return f"expected the text {reference.text!r}, got {reply.text!r}"
    if not is_whole and not reference.text.startswith(reply.text.rstrip(_INCOMPLETE)):
        return f"expected a beginning of the text {reference.text!r}, got {reply.text!r}"
    if is_whole and reply.finish != reference.finish:
        return f"expected the end {reference.finish}, got {reply.finish}"
    return None


def _compare_text(reply: Reply, reference: Reply, bound: float) -> Comparison:
    """Without token ids there is no telling which token differs; a near-tie anywhere excuses another text."""
    expected = reference.tokens or ()
    if reply.text == reference.text:
        fault = None
        if reply.finish not in NO_FINISH and reply.finish != reference.finish:
            fault = f"expected the end {reference.finish}, got {reply.finish}"
        return Comparison(() if fault is None else (fault,), tokens=len(expected))
    near_ties = [index for index, token in enumerate(expected) if not is_certain(token.margin, bound)]
    if near_ties:
        return Comparison(parting=near_ties[0])
    return Comparison((f"expected the text {reference.text!r}, got {reply.text!r}",))


def compare_distributions(reply: Reply, expected: torch.Tensor, bound: float) -> Comparison:
    """Compare one answer with the log-probabilities of every token, ``[len(tokens), vocab_size]``."""
    if reply.distributions is None or not (error := largest_difference(reply.distributions, expected)) <= bound:
        error = float("inf") if reply.distributions is None else error
        return Comparison((f"a log-probability is off by {error:.2e}, allowed {bound:.2e}",))
    return compare_tokens(tokens_along(expected, reply.token_ids), reply.tokens or (), bound)


def largest_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ or either has a value that is not finite."""
    if left.shape != right.shape or not (left.isfinite().all() and right.isfinite().all()):
        return float("inf")
    return (left - right).abs().max().item() if left.numel() else 0.0


async def judge(
    verdict: Verdict, name: str, question: Question, reference: Reply, reply: Reply, bound: float, score: Score | None
) -> None:
    """Compare one answer with another backend's; the findings go to ``verdict``.

    Args:
        verdict (Verdict): of all answers.
        name (str): of the answer, for faults.
        question (Question): what was asked.
        reference (Reply): the other backend's answer.
        reply (Reply): what is judged.
        bound (float): largest difference of a log-probability between two right answers.
        score (Score | None): scores a continuation on the reference's side; used where the two part. None: nothing is
            compared behind a parting.
    """
    verdict.answers += 1
    expected, got = reference.tokens or (), reply.tokens or ()
    if len(got) != question.new_tokens:
        verdict.faults.append(f"{name}: expected {question.new_tokens} tokens, got {len(got)}")
        return
    if reference.token_ids == reply.token_ids:
        verdict.identical += 1
    else:
        verdict.partings += 1
        if score is not None:
            scored = await score(question.prompt_ids, reply.token_ids)
            expected = _followed(expected, scored, reply.token_ids)
    found = compare_tokens(expected, got, bound)
    verdict.add(found, name)
    if found.parting is not None:
        verdict.uncompared += len(got) - found.parting


def _followed(reference: Sequence[Token], scored: Sequence[Token], token_ids: Ids) -> tuple[Token, ...]:
    """What the reference says along other tokens: its own as long as they agree, its scores behind that.

    Where they part, best token and margin are those of its generation; only the score knows the other token's
    log-probability.
    """
    parting = next(i for i, (own, other) in enumerate(zip(reference, token_ids, strict=True)) if own.token_id != other)
    own = reference[parting]
    there = scored[parting]._replace(best_id=own.best_id, margin=own.margin)
    return (*reference[:parting], there, *scored[parting + 1 :])
