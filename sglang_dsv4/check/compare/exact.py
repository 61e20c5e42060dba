"""How far a backend is from exact arithmetic: transformers' full forward in fp32, on the same weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sglang_dsv4.check.bound import Spread
from sglang_dsv4.check.reply import Question, Reply
from sglang_dsv4.spec import CSA_RATIO

# A forward costs as much as the square of its length, and a GPU waits for it.
LONGEST = 1024


def exact_differences(
    checkpoint: Path, questions: Sequence[Question], answers: Sequence[Reply], count: int, device: str = "cpu"
) -> list[float]:
    """By how much log-probabilities of a run differ from exact ones, along the run's own tokens.

    Only for contexts in which a CSA query attends to every entry: in longer ones rounding may choose other entries, and how far
    that moves an answer says nothing about rounding. And up to `LONGEST` tokens.

    Args:
        checkpoint (Path): what the backend served.
        questions (Sequence[Question]): what it was asked.
        answers (Sequence[Reply]): what it answered.
        count (int): how many answers are computed exactly, spread over all.
        device (str): where. On a CPU that servers keep busy, one answer takes several seconds.

    Raises:
        ValueError: every question is too long.
    """
    # Not before: kernels are timed on machines without transformers, too.
    from sglang_dsv4.check.oracle import Oracle

    oracle = Oracle(checkpoint, device)
    longest = min(LONGEST, CSA_RATIO * oracle.index_topk)
    short = [
        number
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True))
        if len(question.prompt_ids) + len(answer.token_ids) <= longest
    ]
    if not short:
        raise ValueError(f"exact answers: expected a prompt and answer of at most {longest} tokens, got none")
    found: list[float] = []
    for number in short[:: max(1, len(short) // count)]:
        prompt_ids, answer = questions[number].prompt_ids, answers[number]
        logprobs = oracle.logprobs((*prompt_ids, *answer.token_ids[:-1]))[len(prompt_ids) - 1 :]
        pairs = zip(answer.tokens or (), logprobs, strict=True)
        found += [token.logprob - float(exact[token.token_id]) for token, exact in pairs if token.logprob is not None]
    return found


def expect_of_checkpoint(exact: Spread, answers: Sequence[Reply], checkpoint: Path) -> None:
    """Refuse a reference that does not compute this checkpoint: a bound from its distance would let everything pass.

    Log-probabilities of another model are independent of the exact ones, and so typically further from them than from their
    own mean; rounding must stay below half of that to be called rounding.

    Args:
        exact (Spread): of `exact_differences`.
        answers (Sequence[Reply]): the reference's.
        checkpoint (Path): for the message.

    Raises:
        ValueError: they are not answers of the checkpoint.
    """
    own = np.std([token.logprob for answer in answers for token in answer.tokens or ()])
    if exact.typical > own / 2:
        raise ValueError(
            f"{checkpoint}: expected the model that answered, got another; log-probabilities are typically {exact.typical:.3g} "
            f"from exact ones, and {own:.3g} from their own mean"
        )
