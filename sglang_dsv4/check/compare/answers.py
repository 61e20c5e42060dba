"""A server's answers to all questions, and the file that keeps them."""

import asyncio
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_dsv4.check.client import Client
from sglang_dsv4.check.reply import Ids, Question, Reply, Token, check_scored

ANSWERS = "answers.json"


@dataclass(frozen=True)
class Run:
    """One pass over all questions.

    Attributes:
        name (str): side, way, and ``cold``, ``hit`` or ``again``.
        answers (list[Reply]): in the order of the questions.
    """

    name: str
    answers: list[Reply]

    @property
    def cached_tokens(self) -> int:
        """Of all prompts together."""
        return sum(answer.cached_tokens for answer in self.answers)


@dataclass(frozen=True)
class Passes:
    """How the questions are sent to each server."""

    questions: list[Question]
    concurrency: int

    async def run(self, client: Client, name: str) -> list[Run]:
        """All questions on a cold cache, at prefix hits, and on a cold cache again, in an order that depends on ``name``.

        The last pass is the control of the second: how far answers are apart in other batches, without any hit.
        """
        order = list(range(len(self.questions)))
        random.Random(name).shuffle(order)
        found = []
        for kind in ("cold", "hit", "again"):
            if kind != "hit":
                await client.flush()
            if kind == "again":
                order.reverse()
            found.append(Run(f"{name} {kind}", await self._ask(client, order)))
        return found

    async def _ask(self, client: Client, order: Sequence[int]) -> list[Reply]:
        """Ask everything in this order, ``concurrency`` at once; the answers in the order of the questions."""
        found: dict[int, Reply] = {}
        waiting = iter(order)

        async def one_client() -> None:
            for number in waiting:
                found[number] = await ask(client, self.questions[number])

        await asyncio.gather(*(one_client() for _ in range(self.concurrency)))
        return [found[number] for number in range(len(self.questions))]


async def ask(client: Client, question: Question) -> Reply:
    """The answer to one question.

    Raises:
        ValueError: log-probabilities are missing.
    """
    return check_scored(await client.generate(question.prompt_ids, question.new_tokens))


class Scorer:
    """Scores of one server, each asked for once.

    Args:
        client (Client): the server.
        concurrency (int): requests at once.
    """

    def __init__(self, client: Client, concurrency: int) -> None:
        self._client = client
        self._free = asyncio.Semaphore(concurrency)
        self._known: dict[tuple[Ids, Ids], list[Token]] = {}

    async def __call__(self, prompt_ids: Ids, token_ids: Ids) -> list[Token]:
        """`Client.score`, or what it returned before."""
        wanted = (prompt_ids, token_ids)
        if wanted not in self._known:
            async with self._free:
                self._known[wanted] = await self._client.score(prompt_ids, token_ids)
        return self._known[wanted]

    async def prepare(self, questions: Sequence[Question], reference: Sequence[Reply], judged: Sequence[Reply]) -> None:
        """Ask at the same time for everything that judging these answers will need."""
        both = zip(questions, reference, judged, strict=True)
        wanted = {
            (question.prompt_ids, reply.token_ids) for question, right, reply in both if reply.token_ids != right.token_ids
        }
        await asyncio.gather(*(self(*pair) for pair in wanted))


def write_answers(path: Path, questions: Sequence[Question], runs: Iterable[Run], where: dict[str, Any]) -> None:
    """Keep what servers answered, and their environment: judging it again takes no server."""
    report = {
        "environment": where,
        "questions": [[list(question.prompt_ids), question.new_tokens] for question in questions],
        "runs": {run.name: [[reply.cached_tokens, *(reply.tokens or ())] for reply in run.answers] for run in runs},
    }
    path.write_text(json.dumps(report) + "\n", encoding="utf-8")


def read_answers(path: Path) -> tuple[list[Question], dict[str, Run], dict[str, Any] | None]:
    """What `write_answers` wrote: the questions, every run by its name, and the environment if it was kept.

    Raises:
        ValueError: it is another file.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected answers that `compare` kept, got {error}") from error
    if not isinstance(report, dict) or not {"questions", "runs"} <= report.keys():
        raise ValueError(f"{path}: expected answers that `compare` kept, got another file")
    questions = [Question(tuple(ids), new_tokens) for ids, new_tokens in report["questions"]]
    runs = {
        name: Run(name, [Reply(tuple(Token(*t) for t in tokens), cached_tokens=cached) for cached, *tokens in answers])
        for name, answers in report["runs"].items()
    }
    return questions, runs, report.get("environment")
