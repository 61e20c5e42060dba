"""What a server answered."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Answer:
    """One greedy continuation.

    Attributes:
        name (str): of the request.
        prompt_ids (tuple[int, ...]): what was asked.
        output_ids (tuple[int, ...]): tokens generated.
        logprobs (torch.Tensor): ``[len(output_ids), vocab_size]`` fp32, the distribution each token was taken from.
        cached_tokens (int): prompt tokens served from the prefix cache.
        text (str): the tokens as text.
        seconds (float): from sending the request to having the whole answer.
    """

    name: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    logprobs: torch.Tensor
    cached_tokens: int
    text: str
    seconds: float

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token the server read: the prompt, and the output but its last token."""
        return self.prompt_ids + self.output_ids[:-1]

    @property
    def generated(self) -> slice:
        """Positions of `token_ids` whose next token was generated."""
        return slice(len(self.prompt_ids) - 1, len(self.prompt_ids) - 1 + len(self.output_ids))


def read_answer(name: str, prompt_ids: tuple[int, ...], reply: dict[str, Any], seconds: float) -> Answer:
    """Read the reply of ``/generate``.

    Args:
        name (str): of the request.
        prompt_ids (tuple[int, ...]): what was asked.
        reply (dict[str, Any]): asked for with ``return_logprob`` and, in ``token_ids_logprob``, the whole vocabulary.
        seconds (float): measured by the caller.

    Raises:
        ValueError: the reply is not complete; the message names what is missing.
    """
    meta = reply.get("meta_info", {})
    for key in ("cached_tokens", "output_token_logprobs", "output_token_ids_logprobs"):
        if meta.get(key) is None:
            raise ValueError(f"{name}: expected meta_info.{key} in the server's reply, got {sorted(meta)}")
    output_ids = tuple(int(token_id) for _, token_id, *_ in meta["output_token_logprobs"])
    rows = meta["output_token_ids_logprobs"]
    if len(rows) != len(output_ids):
        raise ValueError(f"{name}: expected log-probabilities of {len(output_ids)} tokens, got {len(rows)}")
    for row in rows:
        token_ids = [int(token_id) for _, token_id, *_ in row]
        if token_ids != list(range(len(token_ids))):
            raise ValueError(f"{name}: expected log-probabilities of the whole vocabulary in order, got {token_ids[:4]}...")
    logprobs = torch.tensor([[value for value, *_ in row] for row in rows], dtype=torch.float32)
    return Answer(name, prompt_ids, output_ids, logprobs, int(meta["cached_tokens"]), str(reply.get("text", "")), seconds)
