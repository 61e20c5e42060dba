"""How far apart right answers may be: every allowed difference of a log-probability comes from here.

A server that is right makes rounding errors in other places, or another order, than the computation it is compared with.
So its distance from exact arithmetic is of the size of a measured one, and two such servers are at most twice that apart.
"""

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sglang_dsv4.check.reply import Ids, Reply, Token

if TYPE_CHECKING:  # it needs transformers, which machines that only time kernels do not have
    from sglang_dsv4.check.oracle import Oracle

# A server's fp32 arithmetic is another order of the same operations. Its error against exact arithmetic has the size of
# the oracle's own, which is measured; the two may add up (2), and both are maxima over a sample of positions (2).
ARITHMETIC_FACTOR = 4.0
# The server's rounding errors have the size of the calibrated ones, in other places.
ROUNDING_FACTOR = 2.0


def comparison_bound(rounding: float, arithmetic: float) -> float:
    """How far a right server's log-probabilities may be from the oracle's.

    Args:
        rounding (float): largest `Oracle.rounding_error` over the positions compared; 0 where the oracle's rows are
            rounded as the server's are.
        arithmetic (float): largest `Oracle.arithmetic_error` over the positions compared, with the oracle's row format.
    """
    return ROUNDING_FACTOR * rounding + ARITHMETIC_FACTOR * arithmetic


def is_certain(margin: float, bound: float) -> bool:
    """Whether the best token must stay the best: either of the two best may move by ``bound``."""
    return margin > 2 * bound


def measured_bound(oracle: "Oracle", sequences: Sequence[Ids], row_format: str) -> float:
    """How far apart two runs of one fp32 server may be, by the checkpoint's rounding errors on some sequences.

    Each of the two is within `comparison_bound` of exact arithmetic over rows that are rounded alike.

    Args:
        oracle (Oracle): of the checkpoint that is served.
        sequences (Sequence[Ids]): like those that are compared.
        row_format (str): of the cache.
    """
    return 2 * comparison_bound(0.0, max(oracle.arithmetic_error(ids, row_format).max().item() for ids in sequences))


async def served_bound(
    references: Sequence[tuple[Ids, Reply]], score: Callable[[Ids, Ids], Awaitable[Sequence[Token]]]
) -> float:
    """How far apart two runs of a server may be whose checkpoint is not here, by its own rounding.

    Tokens that were decoded one by one are scored in one prefill: the same numbers, added in another order, as in a batch
    with other requests. Other runs may differ by as much again, and both are maxima over a sample; so the factor is that of
    `comparison_bound`.

    Args:
        references (Sequence[tuple[Ids, Reply]]): prompts, and the answers alone on a cold cache.
        score (Callable[[Ids, Ids], Awaitable[Sequence[Token]]]): scores tokens behind a prompt, in a prefill.
    """
    largest = 0.0
    for prompt_ids, reply in references:
        decoded = reply.tokens or ()
        largest = max(largest, spread_of(moved(decoded, await score(prompt_ids, reply.token_ids))).largest)
    return comparison_bound(0.0, largest)


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
    """The spread of some differences; zero without any."""
    if not differences:
        return Spread()
    values = np.asarray(differences)
    return Spread(float(np.abs(values).max()), math.sqrt(float(np.square(values).mean())))


def moved(first: Sequence[Token], second: Sequence[Token]) -> list[float]:
    """Differences of log-probability over the tokens that two runs have in common from the start."""
    found = []
    for a, b in zip(first, second, strict=False):
        if a.token_id != b.token_id:
            break
        if a.logprob is not None and b.logprob is not None:
            found.append(a.logprob - b.logprob)
    return found


def run_spread(first: Sequence[Reply], second: Sequence[Reply]) -> Spread:
    """How far apart two runs are, answer by answer."""
    pairs = zip(first, second, strict=True)
    return spread_of([value for a, b in pairs for value in moved(a.tokens or (), b.tokens or ())])


def own_rounding(runs: Sequence[Sequence[Reply]], scored: dict[int, list[Token]]) -> Spread:
    """How far apart one backend's own ways are: the widest spread of any run, or of the scores, from the first run.

    Args:
        runs (Sequence[Sequence[Reply]]): answers to the same questions, by way; the first is the reference.
        scored (dict[int, list[Token]]): by question, the reference's own tokens scored in one prefill.
    """
    reference = runs[0]
    widest = spread_of([v for number, tokens in scored.items() for v in moved(reference[number].tokens or (), tokens)])
    for run in runs[1:]:
        widest = widest.or_more(run_spread(reference, run))
    return widest


def backend_bound(
    reference: Sequence[Sequence[Reply]],
    judged: Sequence[Sequence[Reply]],
    rounded: Sequence[Sequence[Reply]] | None,
    scored: dict[int, list[Token]],
    exact: Spread,
) -> dict[str, float]:
    """Allowed differences between two backends, of one token and of all (the root of their mean square), and their origin.

    Each may be as far from exact arithmetic as the reference is, and the two twice that apart. The reference's own ways
    round in the same places, and are closer to each other than to exact arithmetic; where nothing exact is known, they have
    to do. Another row format adds what it does to the judged backend, twice for the same reason.

    Args:
        reference (Sequence[Sequence[Reply]]): runs of the backend whose answers count as right.
        judged (Sequence[Sequence[Reply]]): runs of the other.
        rounded (Sequence[Sequence[Reply]] | None): runs of the judged backend with the reference's row format.
        scored (dict[int, list[Token]]): as `own_rounding`.
        exact (Spread): how far the reference is from exact arithmetic; zero where that is not known.
    """
    own = own_rounding(reference, scored)
    rows = Spread() if rounded is None else run_spread(judged[0], rounded[0])
    least, found = own.or_more(exact), {}
    for prefix, kind in (("", "largest"), ("typical_", "typical")):
        parts = {"own_rounding": own, "from_exact": exact, "row_rounding": rows}
        found |= {f"{prefix}{name}": getattr(spread, kind) for name, spread in parts.items()}
        found[f"{prefix}bound"] = 2 * getattr(least, kind) + 2 * getattr(rows, kind)
    return found
