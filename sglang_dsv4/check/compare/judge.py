"""Whether answers agree, given how far apart right answers may be."""

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from sglang_dsv4.check.compare.ask import Answer, Question, Token

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
        uncompared (int): log-probabilities at and behind partings that nobody scored.
        largest (float): largest difference of a log-probability.
        squares (float): sum of the squared differences.
        faults (list[str]): everything that may not be.
    """

    answers: int = 0
    identical: int = 0
    tokens: int = 0
    certain: int = 0
    partings: int = 0
    uncompared: int = 0
    largest: float = 0.0
    squares: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def typical(self) -> float:
        """Root of the mean squared difference."""
        return math.sqrt(self.squares / max(1, self.tokens))

    def to_dict(self) -> dict[str, object]:
        """Plain values; of the faults the first ten."""
        return {
            **{
                name: getattr(self, name)
                for name in ("answers", "identical", "tokens", "certain", "partings", "uncompared", "largest")
            },
            "typical": self.typical,
            "num_faults": len(self.faults),
            "faults": self.faults[:10],
        }


@dataclass(frozen=True)
class Spread:
    """How far apart log-probabilities are that should be equal.

    Attributes:
        largest (float): the largest difference.
        typical (float): root of the mean squared difference.
    """

    largest: float = 0.0
    typical: float = 0.0

    def or_more(self, other: "Spread") -> "Spread":
        """The wider of the two, in either number."""
        return Spread(max(self.largest, other.largest), max(self.typical, other.typical))


def spread_of(differences: Sequence[float]) -> Spread:
    """Of all of them."""
    if not differences:
        return Spread()
    squares = math.fsum(difference**2 for difference in differences)
    return Spread(max(map(abs, differences)), math.sqrt(squares / len(differences)))


def moved(first: Sequence[Token], second: Sequence[Token]) -> list[float]:
    """Differences of log-probability over the tokens that two runs have in common from the start.

    At the place where they part, the tokens differ and are not compared.
    """
    found = []
    for a, b in zip(first, second, strict=False):
        if a.token_id != b.token_id:
            break
        found.append(a.logprob - b.logprob)
    return found


def run_spread(first: Sequence[Answer], second: Sequence[Answer]) -> Spread:
    """How far two runs are apart."""
    pairs = zip(first, second, strict=True)
    return spread_of([value for a, b in pairs for value in moved(a.tokens, b.tokens)])


def own_rounding(runs: Sequence[Sequence[Answer]], scored: dict[int, list[Token]]) -> Spread:
    """How far apart one backend's own ways are: the widest spread of any run, or of the scores, from the first run.

    Args:
        runs (Sequence[Sequence[Answer]]): answers to the same questions, by way; the first is the reference.
        scored (dict[int, list[Token]]): by question, the reference's own tokens scored in one prefill.
    """
    reference = runs[0]
    scores = [value for number, tokens in scored.items() for value in moved(reference[number].tokens, tokens)]
    widest = spread_of(scores)
    for run in runs[1:]:
        widest = widest.or_more(run_spread(reference, run))
    return widest


async def judge(
    verdict: Verdict, name: str, question: Question, reference: Answer, answer: Answer, bound: float, score: Score | None
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
        score (Score | None): scores a continuation on the reference's side; used where the two part. None: what follows a
            parting is not compared.
    """
    verdict.answers += 1
    if len(answer.tokens) != question.new_tokens:
        verdict.faults.append(f"{name}: expected {question.new_tokens} tokens, got {len(answer.tokens)}")
        return
    expected = reference.tokens
    if reference.token_ids == answer.token_ids:
        verdict.identical += 1
    else:
        verdict.partings += 1
        if score is None:
            parting = _parting(expected, answer.token_ids)
            expected = expected[: parting + 1]
            verdict.uncompared += len(answer.tokens) - parting
        else:
            rest = await score(question.prompt_ids, answer.token_ids)
            expected = _followed(expected, rest, answer.token_ids)
    compared = answer.tokens[: len(expected)]
    for index, (wanted, got) in enumerate(zip(expected, compared, strict=True)):
        # Of a token that the reference did not take only a score knows the log-probability.
        if wanted.token_id == got.token_id:
            verdict.tokens += 1
            difference = abs(wanted.logprob - got.logprob)
            verdict.largest = max(verdict.largest, difference)
            verdict.squares += difference**2
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


def _followed(reference: Sequence[Token], scored: Sequence[Token], token_ids: Sequence[int]) -> tuple[Token, ...]:
    """What the reference says along other tokens: its own as long as they agree, behind that what it scored.

    Where they part, its choice and margin are those of its generation; of the other token only the score knows.
    """
    parting = _parting(reference, token_ids)
    own, other = reference[parting], scored[parting]
    there = Token(other.token_id, other.logprob, own.best_id, own.margin)
    return (*reference[:parting], there, *scored[parting + 1 :])


def _parting(reference: Sequence[Token], token_ids: Sequence[int]) -> int:
    """Where an answer takes another token."""
    return next(index for index, (token, other) in enumerate(zip(reference, token_ids, strict=True)) if token.token_id != other)
