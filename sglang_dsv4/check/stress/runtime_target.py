"""The same cases against the in-process runtime."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.check.reply import Ids, Question, Reply, Token, tokens_along
from sglang_dsv4.check.stress.cases import CHAT, Case, make_case
from sglang_dsv4.check.stress.load import Load, Watch
from sglang_dsv4.check.stress.replies import Outcome
from sglang_dsv4.runtime.output import Completion
from sglang_dsv4.runtime.runtime import Runtime

ROW_FORMAT = "fp32"


class RuntimeTarget:
    """A runtime: cases in batches, and one alone.

    Chats are plain prompts here, a client that leaves closes its handle in the middle, and an invalid body stands for a token
    id out of range.

    Args:
        checkpoint (Path): a tiny one: transformers' full forward says by how much a token was ahead.
        num_pages (int): of the cache.
        max_requests (int): sequences at once.
    """

    idle_s = 0.0

    def __init__(self, checkpoint: Path, num_pages: int, max_requests: int) -> None:
        self.name = f"--runtime {checkpoint}"
        self._checkpoint = checkpoint
        exact = {"dtype": "float32", "row_format": ROW_FORMAT}
        self.runtime = Runtime(checkpoint, **exact, num_pages=num_pages, max_requests=max_requests)
        self._oracle = Oracle(checkpoint)
        self._began = time.monotonic()

    async def close(self) -> None:
        """Nothing is connected."""

    async def run(self, load: Load, watch: Watch, is_stopped: Callable[[], bool]) -> tuple[list[Outcome], tuple[()]]:
        """Run the load, ``load.concurrency`` cases in a batch."""
        outcomes: list[Outcome] = []
        number, deadline = load.first, time.monotonic() + 60 * load.minutes
        last = load.first + (load.requests or 1 << 62)
        while not is_stopped() and number < last and (load.requests or time.monotonic() < deadline):
            upto = min(number + load.concurrency, last)
            for outcome in self.send([make_case(load.seed, index) for index in range(number, upto)]):
                outcomes.append(outcome)
                watch.note(outcome)
            number = upto
        return outcomes, ()

    def send(self, cases: Sequence[Case]) -> list[Outcome]:
        """Run cases, those that ask for the same number of tokens and stop strings in one batch."""
        started, found = time.monotonic(), list[Outcome]()

        def note(case: Case, done: Iterable[Completion], status: int = 200) -> None:
            pairs = zip(self._prompts(case) * case.n, done, strict=False)
            answers = [
                Reply(tuple(map(Token, one.tokens)), one.text, one.finish, len(prompt), one.cached_tokens)
                for prompt, one in pairs
            ]
            seconds = time.monotonic() - started
            found.append(Outcome(case, status, tuple(answers), (), started - self._began, seconds))

        whole = []
        for case in cases:
            if case.invalid is not None:
                note(case, (), self._refuse())
            elif case.leave_after is not None:
                with self.runtime.open(case.prompts[0]) as handle:
                    note(case, [handle.generate(case.leave_after, stop=())])
            elif case.n > 1:
                note(case, self._branch(case))
            else:
                whole.append(case)
        whole.sort(key=_kind)
        for (new_tokens, stop), group in groupby(whole, key=_kind):
            together = list(group)
            prompts = [ids for case in together for ids in self._prompts(case)]
            done = iter(self.runtime.generate(prompts, new_tokens, stop=stop, progress=False))
            for case in together:
                note(case, list(islice(done, len(self._prompts(case)))))
        return sorted(found, key=lambda outcome: outcome.case.number)

    async def ask(self, question: Question) -> Reply:
        """The answer to a question alone, with an empty index; its log-probabilities are transformers'."""
        prompt_ids, new_tokens, stop = question
        self.runtime.engine.index.clear()
        (done,) = self.runtime.generate([prompt_ids], new_tokens, stop=stop, progress=False)
        return Reply(tuple(await self.score(prompt_ids, done.tokens)), done.text, done.finish)

    async def score(self, prompt_ids: Ids, token_ids: Ids) -> Sequence[Token]:
        """Tokens behind a prompt, as transformers scores them."""
        rows = self._oracle.logprobs((*prompt_ids, *token_ids[:-1]), row_format=ROW_FORMAT)[len(prompt_ids) - 1 :]
        return tokens_along(rows, token_ids)

    async def tokenize(self, message: str) -> Ids:
        """The tokens of a chat."""
        return tuple(self.runtime.text.encode(message))

    async def facts(self) -> dict[str, Any]:
        """The use of the pools, as the plug-in reports it for a server; the index gives up what it holds."""
        self.runtime.engine.collect()
        self.runtime.engine.index.clear()
        self.runtime.cache.check_integrity(memory=True)
        counts = self.runtime.cache.report().counts
        usage = {}
        for pool in ("history_pages", "window_pages", "state_slots"):
            total, free = counts[pool], counts[f"{pool}_free"]
            usage[pool] = {"total": total, "free": free, "cached": 0, "used": total - free}
        report = {"total_bytes": self.runtime.cache.report().total_bytes, "row_format": ROW_FORMAT}
        about = {"model_path": str(self._checkpoint), "dtype": "float32", "device": "cpu"}
        return {"usage": usage, "report": report, "memory": {}, **about}

    def _prompts(self, case: Case) -> list[list[int]]:
        if case.endpoint == CHAT:
            return [self.runtime.text.encode(case.message)]
        return [list(ids) for ids in case.prompts]

    def _branch(self, case: Case) -> list[Completion]:
        with self.runtime.open(case.prompts[0]) as first, ExitStack() as forks:
            handles = [first, *(forks.enter_context(first.fork()) for _ in range(case.n - 1))]
            return list(self.runtime.generate(handles, case.new_tokens, stop=(), progress=False))

    def _refuse(self) -> int:
        try:
            self.runtime.generate([[9, 10_000_000]], 2, progress=False)
        except ValueError:
            return 400
        return 200


def _kind(case: Case) -> tuple[int, tuple[str, ...]]:
    return case.new_tokens, case.stop
