"""The same cases against the in-process runtime."""

import time
from collections.abc import Callable, Sequence
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
        self.runtime = Runtime(
            checkpoint, dtype="float32", row_format=ROW_FORMAT, num_pages=num_pages, max_requests=max_requests
        )
        self._oracle = Oracle(checkpoint)
        self._began = time.monotonic()

    async def close(self) -> None:
        """Nothing is connected."""

    async def run(self, load: Load, watch: Watch, is_stopped: Callable[[], bool]) -> tuple[list[Outcome], tuple[()]]:
        """Run the load, ``load.concurrency`` cases in a batch."""
        outcomes: list[Outcome] = []
        number, deadline = load.first, time.monotonic() + 60 * load.minutes
        last = None if load.requests is None else load.first + load.requests
        while not is_stopped() and (number < last if last is not None else time.monotonic() < deadline):
            upto = number + load.concurrency if last is None else min(number + load.concurrency, last)
            for outcome in self.send([make_case(load.seed, index) for index in range(number, upto)]):
                outcomes.append(outcome)
                watch.note(outcome)
            number = upto
        return outcomes, ()

    def send(self, cases: Sequence[Case]) -> list[Outcome]:
        """Run cases, those that ask for the same number of tokens and stop strings in one batch."""
        started = time.monotonic()
        found: list[Outcome] = []
        for case in cases:
            if case.invalid is not None:
                found.append(self._outcome(case, (), started, status=self._refuse()))
            elif case.leave_after is not None:
                found.append(self._outcome(case, self._leave(case), started))
            elif case.n > 1:
                found.append(self._outcome(case, self._branch(case), started))
        whole = [case for case in cases if case.num_answers and _is_plain(case)]
        whole.sort(key=_kind)
        for (new_tokens, stop), group in groupby(whole, key=_kind):
            together = list(group)
            prompts = [ids for case in together for ids in self._prompts(case)]
            done = iter(self.runtime.generate(prompts, new_tokens, stop=stop, progress=False))
            for case in together:
                number = len(self._prompts(case))
                answers = [self._answer(i, case, c) for i, c in enumerate(islice(done, number))]
                found.append(self._outcome(case, answers, started))
        return sorted(found, key=lambda outcome: outcome.case.number)

    async def ask(self, question: Question) -> Reply:
        """The answer to a question alone, with an empty index; its log-probabilities are transformers'."""
        prompt_ids, new_tokens, stop = question
        self.runtime.index.clear()
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
        self.runtime.collect()
        self.runtime.index.clear()
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

    def _branch(self, case: Case) -> list[Reply]:
        with self.runtime.open(case.prompts[0]) as first:
            forks = [first.fork() for _ in range(case.n - 1)]
            done = self.runtime.generate([first, *forks], case.new_tokens, stop=(), progress=False)
            for fork in forks:
                fork.close()
        return [self._answer(0, case, completion) for completion in done]

    def _leave(self, case: Case) -> list[Reply]:
        assert case.leave_after is not None, "asked for only where the client leaves"
        with self.runtime.open(case.prompts[0]) as handle:
            return [self._answer(0, case, handle.generate(case.leave_after, stop=()))]

    def _refuse(self) -> int:
        try:
            self.runtime.generate([[9, 10_000_000]], 2, progress=False)
        except ValueError:
            return 400
        return 200

    def _answer(self, prompt: int, case: Case, done: Completion) -> Reply:
        length = len(self._prompts(case)[prompt])
        return Reply(tuple(map(Token, done.tokens)), done.text, done.finish, length, done.cached_tokens)

    def _outcome(self, case: Case, answers: Sequence[Reply], started: float, status: int = 200) -> Outcome:
        now = time.monotonic()
        return Outcome(case, status, tuple(answers), (), started - self._began, now - started)


def _is_plain(case: Case) -> bool:
    return case.invalid is None and case.leave_after is None and case.n == 1


def _kind(case: Case) -> tuple[int, tuple[str, ...]]:
    return case.new_tokens, case.stop
