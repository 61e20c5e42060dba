"""Starts the servers of a comparison and collects their answers."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from sglang_dsv4.check.compare.ask import Answer, Question, Token, ask_all
from sglang_dsv4.check.compare.client import ServeClient
from sglang_dsv4.check.compare.side import Side, SideServer, facts_of, wait_until_ready

ANSWERS = "answers.json"


@dataclass(frozen=True)
class Way:
    """How a server computes: with CUDA graphs or without, and in chunks of how many tokens."""

    mode: str
    chunk: int

    @property
    def name(self) -> str:
        """Such as ``graph-512``."""
        return f"{self.mode}-{self.chunk}"

    def options(self) -> tuple[str, ...]:
        """For SGLang."""
        eager = ("--disable-cuda-graph",) if self.mode == "eager" else ()
        return ("--chunked-prefill-size", str(self.chunk), *eager)


def read_way(text: str) -> Way:
    """The way of that name.

    Raises:
        ValueError: there is none.
    """
    mode, _, chunk = text.partition("-")
    if mode not in ("graph", "eager") or not chunk.isdigit() or int(chunk) % 256:
        raise ValueError(f"way: expected graph-N or eager-N, N a multiple of 256, got {text!r}")
    return Way(mode, int(chunk))


@dataclass(frozen=True)
class Run:
    """One pass over all questions.

    Attributes:
        name (str): side, way, and ``cold``, ``hit`` or ``again``.
        answers (list[Answer]): in the order of the questions.
    """

    name: str
    answers: list[Answer]

    @property
    def cached_tokens(self) -> int:
        """Of all prompts together."""
        return sum(answer.cached_tokens for answer in self.answers)


def write_answers(path: Path, questions: Sequence[Question], runs: Iterable[Run], where: dict[str, Any]) -> None:
    """Keep what servers answered, and their environment: to judge it again takes no server."""
    report = {
        "environment": where,
        "questions": [[list(question.prompt_ids), question.new_tokens] for question in questions],
        "runs": {run.name: [[answer.cached_tokens, *map(astuple, answer.tokens)] for answer in run.answers] for run in runs},
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
        name: Run(name, [Answer(tuple(Token(*t) for t in tokens), cached) for cached, *tokens in answers])
        for name, answers in report["runs"].items()
    }
    return questions, runs, report.get("environment")


@dataclass(frozen=True)
class Passes:
    """How the questions are sent to each server."""

    questions: list[Question]
    concurrency: int

    async def run(self, client: ServeClient, name: str) -> list[Run]:
        """All questions on a cold cache, at prefix hits, and on a cold cache again; in an order of this server's own.

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
            answers = await ask_all(client, self.questions, self.concurrency, order)
            found.append(Run(f"{name} {kind}", answers))
        return found


class Fleet:
    """Servers that end with the ``with`` block, all at the same time.

    Args:
        checkpoint (Path): what they serve.
        folder (Path): for their logs, and their answers.
        device (str): ``cpu`` or ``cuda``.
    """

    def __init__(self, checkpoint: Path, folder: Path, device: str) -> None:
        self._checkpoint = checkpoint
        self.folder = folder
        self._device = device
        self._running: list[SideServer] = []
        self.facts: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *error: Any) -> None:
        self.end(self._running)

    def launch(self, sides: Sequence[Side]) -> None:
        """Let servers start, without waiting for them."""
        for side in sides:
            server = SideServer(side, self._checkpoint, self.folder, self._device)
            server.__enter__()
            self._running.append(server)

    def start(self, sides: Sequence[Side]) -> list[SideServer]:
        """Start servers at the same time, but those that were launched, and wait for all.

        Raises:
            ServerDiedError: one ended.
            TimeoutError: one did not get ready.
        """
        launched = [server.side for server in self._running]
        self.launch([side for side in sides if side not in launched])
        servers = [server for server in self._running if server.side in sides]
        servers.sort(key=lambda server: sides.index(server.side))
        wait_until_ready(servers)
        for server in servers:
            self.facts[server.side.name] = facts_of(server)
        return servers

    def end(self, servers: Sequence[SideServer]) -> None:
        """End some servers; one that has ended may be among them."""
        ending = [server for server in servers if server in self._running]
        for server in ending:
            server.ask_to_end()
        for server in ending:
            self._running.remove(server)
            server.__exit__(None, None, None)
