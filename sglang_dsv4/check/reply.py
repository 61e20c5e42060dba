"""What a server answered: one continuation, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Ids = tuple[int, ...]


class Question(NamedTuple):
    """One prompt, how many tokens to generate, and strings that end the answer before."""

    prompt_ids: Ids
    new_tokens: int
    stop: tuple[str, ...] = ()


class Token(NamedTuple):
    """One token as a server chose or scored it.

    Attributes:
        token_id (int): which.
        logprob (float | None): its log-probability; None where it was not asked for, or was lost.
        best_id (int | None): the likeliest token there; None where alternatives were not asked for.
        margin (float): log-probability of the likeliest token minus that of the second.
    """

    token_id: int
    logprob: float | None = None
    best_id: int | None = None
    margin: float = 0.0


@dataclass(frozen=True)
class Reply:
    """One continuation of a prompt.

    Attributes:
        tokens (tuple[Token, ...] | None): generated tokens; None where the endpoint returns none.
        text (str): the tokens as text.
        finish (str | None): why it ended, such as ``"length"``; None: it did not end.
        prompt_tokens (int): length of the prompt.
        cached_tokens (int): prompt tokens served from the prefix cache, where the endpoint says so.
        retractions (int): how often the server sent the request back to its queue.
        distributions (torch.Tensor | None): ``[len(tokens), vocab_size]`` fp32 log-probabilities each token was drawn from,
            where they were asked for.
    """

    tokens: tuple[Token, ...] | None
    text: str = ""
    finish: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    retractions: int = 0
    distributions: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def token_ids(self) -> Ids:
        """Without their log-probabilities; empty where the endpoint returns no tokens."""
        return tuple(token.token_id for token in self.tokens or ())


def generate_body(prompt_ids: Sequence[int], new_tokens: int, **more: Any) -> dict[str, Any]:
    """The body for ``/generate``: a greedy continuation, with the two best log-probabilities of every generated token.

    Log-probabilities of the prompt are not asked for: SGLang would then not read it from the prefix cache.
    """
    return {
        "input_ids": list(prompt_ids),
        "sampling_params": {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": -1,
        "top_logprobs_num": 2,
        **more,
    }


def read_reply(reply: dict[str, Any]) -> Reply:
    """Read a reply of ``/generate``.

    Raises:
        KeyError: a field is missing.
        ValueError: distributions are incomplete.
    """
    meta, output_ids = reply["meta_info"], reply["output_ids"]
    pairs = meta.get("output_token_logprobs") or ()
    rows = meta.get("output_top_logprobs") or [()] * len(pairs)
    tokens = tuple(read_token(pair, row) for pair, row in zip(pairs, rows, strict=True))
    # SGLang 0.5.17 loses the first log-probability of a request that it retracts before its first token has arrived: it
    # counts one as sent that is not there yet. The tokens are complete.
    is_retracted = meta.get("num_retractions") and output_ids
    if is_retracted and [token.token_id for token in tokens] == list(output_ids[1:]):
        tokens = (Token(output_ids[0]), *tokens)
    distributions = meta.get("output_token_ids_logprobs")
    return Reply(
        tokens,
        reply["text"],
        (meta.get("finish_reason") or {}).get("type"),
        int(meta["prompt_tokens"]),
        int(meta["cached_tokens"]),
        int(meta.get("num_retractions", 0)),
        None if distributions is None else _distributions(distributions, len(tokens)),
    )


def read_token(pair: Sequence[Any], best: Sequence[Sequence[Any]]) -> Token:
    """A token from SGLang's ``(logprob, token id, text)`` and those of the likeliest ones."""
    value, token_id, *_ = pair
    if len(best) < 2:
        return Token(int(token_id), float(value))
    (first, best_id, *_), (second, *_) = best[:2]
    return Token(int(token_id), float(value), int(best_id), first - second)


def tokens_along(distributions: torch.Tensor, token_ids: Sequence[int]) -> tuple[Token, ...]:
    """Given tokens as a model scores them that has these log-probabilities, ``[len(token_ids), vocab_size]``."""
    best, ids = distributions.topk(2, dim=1)
    return tuple(
        Token(token_id, row[token_id].item(), int(two_ids[0]), (two[0] - two[1]).item())
        for token_id, row, two, two_ids in zip(token_ids, distributions, best, ids, strict=True)
    )


def check_scored(reply: Reply, new_tokens: int | None = None) -> Reply:
    """The reply, if each token has its log-probability and a margin.

    Args:
        reply (Reply): to be compared with, or judged.
        new_tokens (int | None): how many tokens it must have.

    Raises:
        ValueError: it has not.
    """
    scored = sum(token.best_id is not None for token in reply.tokens or ())
    wanted = len(reply.token_ids) if new_tokens is None else new_tokens
    if scored != wanted or wanted != len(reply.token_ids):
        raise ValueError(f"reply: expected the two best log-probabilities of {wanted} tokens, got {scored}")
    return reply


def _distributions(rows: Sequence[Sequence[Sequence[Any]]], count: int) -> torch.Tensor:
    if len(rows) != count:
        raise ValueError(f"reply: expected log-probabilities of {count} tokens, got {len(rows)}")
    for row in rows:
        token_ids = [int(token_id) for _, token_id, *_ in row]
        if token_ids != list(range(len(token_ids))):
            raise ValueError(f"reply: expected log-probabilities of the whole vocabulary in order, got {token_ids[:4]}...")
    return torch.tensor([[value for value, *_ in row] for row in rows], dtype=torch.float32)
