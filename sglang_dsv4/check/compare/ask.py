"""Prompts of a comparison, and a server's answers to them."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_dsv4.check.compare.client import ServeClient
from sglang_dsv4.check.compare.prompts import Ids, random_ids

NEW_TOKENS = (4, 12, 24)
# Around blocks of 4 and 128, the window and a page of 256, and whatever lies between.
EDGES = (1, 3, 4, 5, 127, 128, 129, 131, 132, 255, 256, 257, 260, 384, 511, 512, 513, 640, 769)


@dataclass(frozen=True)
class Question:
    """One prompt and how many tokens to generate."""

    prompt_ids: Ids
    new_tokens: int


@dataclass(frozen=True)
class Token:
    """One token as a server chose or scored it.

    Attributes:
        token_id (int): which.
        logprob (float): its log-probability.
        best_id (int): the likeliest token there.
        margin (float): log-probability of the likeliest less that of the second.
    """

    token_id: int
    logprob: float
    best_id: int
    margin: float


@dataclass(frozen=True)
class Answer:
    """What a server generated, and how much of the prompt its prefix cache gave."""

    tokens: tuple[Token, ...]
    cached_tokens: int

    @property
    def token_ids(self) -> Ids:
        """Without their log-probabilities."""
        return tuple(token.token_id for token in self.tokens)


def make_questions(count: int, longest: int, seed: int) -> list[Question]:
    """Mixed lengths; every fourth prompt begins with a page, or two, of another one."""
    rng = random.Random(seed)
    edges = [length for length in EDGES if length <= longest]
    found: list[Question] = []
    for number in range(count):
        length = rng.choice(edges) if number % 2 else rng.randint(1, longest)
        prompt = random_ids(rng, length)
        shared = 256 * rng.randint(1, 2)
        if number % 4 == 3 and length > shared:
            givers = [other for other in found if len(other.prompt_ids) > shared]
            if givers:
                prompt = rng.choice(givers).prompt_ids[:shared] + prompt[shared:]
        found.append(Question(prompt, rng.choice(NEW_TOKENS)))
    return found


def generate_body(question: Question, **more: Any) -> dict[str, Any]:
    """The request for a greedy continuation, with the two best log-probabilities of every token.

    Log-probabilities of the prompt are not asked for: SGLang would then not take it from the prefix cache.
    """
    return {
        "input_ids": list(question.prompt_ids),
        "sampling_params": {"temperature": 0.0, "max_new_tokens": question.new_tokens, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": -1,
        "top_logprobs_num": 2,
        **more,
    }


def read_answer(reply: dict[str, Any]) -> Answer:
    """Read a reply to `generate_body`.

    Raises:
        ValueError: log-probabilities are missing.
    """
    meta = reply["meta_info"]
    chosen, best = meta["output_token_logprobs"], meta["output_top_logprobs"]
    if len(chosen) != meta["completion_tokens"] or len(best) != len(chosen):
        raise ValueError(f"answer: expected {meta['completion_tokens']} log-probabilities, got {len(chosen)} and {len(best)}")
    tokens = tuple(_token(value[1], value[0], top) for value, top in zip(chosen, best, strict=True))
    return Answer(tokens, meta["cached_tokens"])


def _token(token_id: int, logprob: float, top: Sequence[Sequence[Any]]) -> Token:
    (first, best_id, *_), (second, *_) = top
    return Token(token_id, logprob, best_id, first - second)


async def ask_all(client: ServeClient, questions: Sequence[Question], concurrency: int, order: Sequence[int]) -> list[Answer]:
    """Ask everything, so many at once, in an order of one's own; the answers are in the order of ``questions``."""
    found: dict[int, Answer] = {}
    waiting = iter(order)

    async def one_client() -> None:
        for number in waiting:
            found[number] = read_answer(await client.post(generate_body(questions[number])))

    await asyncio.gather(*(one_client() for _ in range(concurrency)))
    return [found[number] for number in range(len(questions))]


async def score(client: ServeClient, prompt_ids: Ids, token_ids: Ids) -> list[Token]:
    """What a server would have chosen at each place of a given continuation, in one prefill.

    Raises:
        ValueError: log-probabilities are missing.
    """
    begin = len(prompt_ids) - 1
    body = generate_body(Question((*prompt_ids, *token_ids), 1)) | {"logprob_start_len": begin}
    meta = (await client.post(body))["meta_info"]
    # The first has no predecessor among those asked for, and no log-probability.
    values = meta["input_token_logprobs"][1:]
    best = meta["input_top_logprobs"][1:]
    if [value[1] for value in values] != list(token_ids):
        raise ValueError(f"score: expected log-probabilities of {list(token_ids)}, got {[value[1] for value in values]}")
    return [_token(value[1], value[0], top) for value, top in zip(values, best, strict=True)]


class Scorer:
    """Scores of one server, each asked for once.

    Args:
        client (ServeClient): the server.
        concurrency (int): requests at once.
    """

    def __init__(self, client: ServeClient, concurrency: int) -> None:
        self._client = client
        self._free = asyncio.Semaphore(concurrency)
        self._known: dict[tuple[Ids, Ids], list[Token]] = {}

    async def __call__(self, prompt_ids: Ids, token_ids: Ids) -> list[Token]:
        """`score`, or what it said before."""
        wanted = (prompt_ids, token_ids)
        if wanted not in self._known:
            async with self._free:
                self._known[wanted] = await score(self._client, prompt_ids, token_ids)
        return self._known[wanted]

    async def prepare(self, questions: Sequence[Question], reference: Sequence[Answer], judged: Sequence[Answer]) -> None:
        """Ask for everything that judging these answers will need, at the same time."""
        both = zip(questions, reference, judged, strict=True)
        wanted = {
            (question.prompt_ids, answer.token_ids) for question, right, answer in both if answer.token_ids != right.token_ids
        }
        await asyncio.gather(*(self(*pair) for pair in wanted))
