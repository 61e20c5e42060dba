"""Whether answers agree, given how far apart right answers may be."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from sglang_dsv4.compare.ask import Answer, Question, Token

Score = Callable[[tuple[int, ...], tuple[int, ...]], Awaitable[list[Token]]]


@dataclass
class Verdict:
    """What a comparison of some answers found.

    Attributes:
        answers (int): compared.
        identical (int): with the same tokens to the end.
        tokens (int): compared, those behind a parting included, which are scored on the reference's side.
        certain (int): tokens at which the reference's two best were further apart than the margin; there it must be the same.
        partings (int): answers that took another token at a close call.
        largest (float): largest difference of a log-probability.
        faults (list[str]): everything that may not be.
    """

    answers: int = 0
    identical: int = 0
    tokens: int = 0
    certain: int = 0
    partings: int = 0
    largest: float = 0.0
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Plain values; of the faults the first ten."""
        return {
            **{name: getattr(self, name) for name in ("answers", "identical", "tokens", "certain", "partings", "largest")},
            "num_faults": len(self.faults),
            "faults": self.faults[:10],
        }  # fmt: skip


def moved(first: Sequence[Token], second: Sequence[Token]) -> float:
    """Largest difference of log-probability over the tokens that two runs have in common from the start.

    At the place where they part, the tokens differ and are not compared.
    """
    largest = 0.0
    for a, b in zip(first, second, strict=False):
        if a.token_id != b.token_id:
            break
        largest = max(largest, abs(a.logprob - b.logprob))
    return largest


def own_rounding(runs: Sequence[Sequence[Answer]], scored: dict[int, list[Token]]) -> float:
    """How far apart one backend's own ways are: the largest difference of any run, or of a score, from the first run.

    Args:
        runs (Sequence[Sequence[Answer]]): answers to the same questions, by way; the first is the reference.
        scored (dict[int, list[Token]]): by question, the reference's own tokens scored in one prefill.
    """
    reference = runs[0]
    found = [0.0]
    for run in runs[1:]:
        found += [moved(a.tokens, b.tokens) for a, b in zip(reference, run, strict=True)]
    found += [moved(reference[number].tokens, tokens) for number, tokens in scored.items()]
    return max(found)


async def judge(
    verdict: Verdict,
    name: str,
    question: Question,
    reference: Answer,
    answer: Answer,
    bound: float,
    score: Score,
) -> None:
    """Compare one answer with the reference's; what is found goes to ``verdict``.

    Args:
        verdict (Verdict): of all.
        name (str): of the answer, for faults.
        question (Question): what was asked.
        reference (Answer): the other backend's answer.
        answer (Answer): what is judged.
        bound (float): two right log-probabilities of one token differ by no more. Two tokens may change places where they
            are closer than twice that.
        score (Score): scores a continuation on the reference's side; used where the two part.
    """
    verdict.answers += 1
    if len(answer.tokens) != question.new_tokens:
        verdict.faults.append(
            f"{name}: expected {question.new_tokens} tokens, got {len(answer.tokens)}"
        )
        return
    expected = reference.tokens
    if reference.token_ids == answer.token_ids:
        verdict.identical += 1
    else:
        verdict.partings += 1
        rest = await score(question.prompt_ids, answer.token_ids)
        expected = _followed(reference.tokens, rest, answer.token_ids)
    for index, (wanted, got) in enumerate(zip(expected, answer.tokens, strict=True)):
        verdict.tokens += 1
        difference = abs(wanted.logprob - got.logprob)
        verdict.largest = max(verdict.largest, difference)
        if difference > bound:
            verdict.faults.append(
                f"{name}: token {index}: log-probability {got.logprob:.4f}, expected {wanted.logprob:.4f}, bound {bound:.3g}"
            )
        if wanted.margin > 2 * bound:
            verdict.certain += 1
            if got.token_id != wanted.best_id:
                verdict.faults.append(
                    f"{name}: token {index}: expected {wanted.best_id}, which is ahead by {wanted.margin:.3g}, got {got.token_id}"
                )


def _followed(
    reference: Sequence[Token], scored: Sequence[Token], token_ids: Sequence[int]
) -> tuple[Token, ...]:
    """What the reference says along other tokens: its own as long as they agree, behind that what it scored.

    Where they part, its choice and margin are those of its generation; of the other token only the score knows.
    """
    parting = next(
        index
        for index, (token, other) in enumerate(zip(reference, token_ids, strict=True))
        if token.token_id != other
    )
    own, other = reference[parting], scored[parting]
    there = Token(other.token_id, other.logprob, own.best_id, own.margin)
    return (*reference[:parting], there, *scored[parting + 1 :])
