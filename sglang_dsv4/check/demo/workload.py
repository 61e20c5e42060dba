"""What the demonstration asks the server, and what it answers."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from sglang_dsv4.check.client import Client
from sglang_dsv4.check.reply import Ids, Reply
from sglang_dsv4.tiny.tokenizer import byte_id

PAGE_TOKENS = 256
NEW_TOKENS = 20

_PROSE = (
    "A model that reads a million words cannot keep them all as they came. It keeps the last hundred and twenty-eight in "
    "full, and of everything before only summaries: one for every four tokens, and one for every hundred and twenty-eight. "
    "Between two summaries it has to remember where it stopped, and that is where caches go wrong. A request may end in "
    "the middle of a block, share its beginning with another, come back after an hour, or be moved to another machine. "
    "Each time the next summary must come out as if nothing had happened. This text is only here to be long enough: it is "
    "cut into prompts of different lengths, some shorter than a block, some just around its edges, some longer than a "
    "page of the cache. What the model answers makes no sense, since its weights are random; but it makes the same "
    "no-sense every time, and another program that has no cache at all can tell what it should have been. So every number "
    "below was computed twice. If the two do not agree, this program says so and fails. Nothing else would be a proof."
)


@dataclass(frozen=True)
class PlannedRequest:
    """One request.

    Attributes:
        name (str): what is special about it.
        prompt_ids (tuple[int, ...]): token ids.
        wave (int): requests of one wave are sent at the same time; a wave begins when the one before has ended.
        min_cached_tokens (int): tokens that the prefix cache must serve.
    """

    name: str
    prompt_ids: tuple[int, ...]
    wave: int
    min_cached_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """One request and its reply.

    Attributes:
        request (PlannedRequest): what was asked.
        reply (Reply): the greedy continuation, with ``distributions``.
        seconds (float): from sending the request to having the whole reply.
    """

    request: PlannedRequest
    reply: Reply
    seconds: float

    @property
    def name(self) -> str:
        """The request's."""
        return self.request.name

    @property
    def distributions(self) -> torch.Tensor:
        """``[new_tokens, vocab_size]`` fp32 log-probabilities that each token was taken from."""
        assert self.reply.distributions is not None, "asked for"
        return self.reply.distributions

    @property
    def token_ids(self) -> Ids:
        """Every token the server read: the prompt, and the output without its last token."""
        return self.request.prompt_ids + self.reply.token_ids[:-1]

    @property
    def generated(self) -> slice:
        """Positions of `token_ids` whose next token was generated."""
        first = len(self.request.prompt_ids) - 1
        return slice(first, first + len(self.reply.token_ids))


async def ask_waves(
    client: Client, requests: Sequence[PlannedRequest], new_tokens: int, vocab_size: int, step: Callable[[], None]
) -> list[Answer]:
    """Send each wave's requests at the same time; ``step`` is called as each answer arrives.

    Returns:
        list[Answer]: in the order of ``requests``.

    Raises:
        httpx.HTTPError: the server did not answer, or refused.
        ValueError: a reply is incomplete.
    """

    async def ask(request: PlannedRequest) -> Answer:
        started = time.monotonic()
        reply = await client.generate(request.prompt_ids, new_tokens, token_ids_logprob=list(range(vocab_size)))
        if reply.distributions is None:
            raise ValueError(f"{request.name}: expected log-probabilities of the whole vocabulary, got none")
        step()
        return Answer(request, reply, time.monotonic() - started)

    found: dict[PlannedRequest, Answer] = {}
    by_wave = sorted(requests, key=lambda request: request.wave)
    for _, wave in groupby(by_wave, key=lambda request: request.wave):
        together = list(wave)
        found |= zip(together, await asyncio.gather(*map(ask, together)), strict=True)
    return [found[request] for request in requests]


def check_answers(answers: Sequence[Answer], new_tokens: int) -> list[str]:
    """Answers of another length than was asked for, or that the prefix cache served less of than it must, or more than it may.

    The last token of a prompt is never served from the cache: it has to be computed.
    """
    faults = []
    for answer in answers:
        count, cached = len(answer.reply.token_ids), answer.reply.cached_tokens
        least, most = answer.request.min_cached_tokens, len(answer.request.prompt_ids) - 1
        if count != new_tokens:
            faults.append(f"{answer.name}: expected {new_tokens} generated tokens, got {count}")
        if not least <= cached <= most:
            faults.append(f"{answer.name}: expected {least} .. {most} tokens from the prefix cache, got {cached}")
    return faults


def plan_requests() -> tuple[PlannedRequest, ...]:
    """The workload, in the order of the table: lengths around every boundary, a shared prefix, a repetition."""
    plain = (
        ("3 tokens", 3, 0),
        ("4 tokens", 4, 21),
        ("5 tokens", 5, 37),
        ("127 tokens", 127, 60),
        ("129 tokens", 129, 190),
        ("256 tokens", 256, 330),
        ("640 tokens", 640, 115),
    )
    requests = [PlannedRequest(name, _cut(start, length), wave=1) for name, length, start in plain]
    shared = _cut(420, 300)
    again = _cut(230, 270)
    cached = PAGE_TOKENS
    requests += [
        PlannedRequest("prefix of 300, first", shared + _cut(0, 11), wave=1),
        PlannedRequest("prefix of 300, second", shared + _cut(700, 18), wave=2, min_cached_tokens=cached),
        PlannedRequest("repeated, first", again, wave=1),
        PlannedRequest("repeated, second", again, wave=2, min_cached_tokens=cached),
    ]
    return tuple(requests)


def _cut(start: int, length: int) -> tuple[int, ...]:
    """``length`` tokens of the prose from byte ``start``."""
    text = _PROSE.encode()
    if start + length > len(text):
        raise ValueError(f"prompt: expected at most {len(text)} bytes of text, got {start} + {length}")
    return tuple(byte_id(byte) for byte in text[start : start + length])
