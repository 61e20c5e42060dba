"""Answers are compared before anything is timed."""

from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_dsv4.check.bound import Spread
from sglang_dsv4.check.client import Client
from sglang_dsv4.check.compare.answers import Passes, Scorer, write_answers
from sglang_dsv4.check.compare.questions import make_questions
from sglang_dsv4.check.compare.result import Result, Runs, Say, find_exact, judge_runs
from sglang_dsv4.check.machine import environment
from sglang_dsv4.check.server import OURS, ROUNDED, THEIRS

CONCURRENCY = 8
NUM_EXACT = 8  # answers that transformers computes: on a CPU a second or two each
# Questions, and tokens of the longest.
QUESTIONS = {"cuda": (24, 1024), "cpu": (4, 300)}


async def check(urls: dict[str, str], checkpoint: Path | None, answers: Path, device: str, say: Say) -> dict[str, Any]:
    """Compare answers of ours, cold and at hits, with the reference's.

    The reference is SGLang's own cache, or ours where that does not run; its rounding is how far it is from itself.

    Args:
        urls (dict[str, str]): of the servers by side; `ROUNDED` is ours with the reference's row format.
        checkpoint (Path | None): what is served, where transformers can compute it in fp32: SGLang's own cache may be as far
            from ours as twice its distance from that.
        answers (Path): where the answers are kept.
        device (str): of the servers, and where transformers computes.
        say (Say): told before a long wait.

    Returns:
        dict[str, Any]: the bound, and the findings.

    Raises:
        ValueError: an answer is wrong; names it.
    """
    async with AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(Client(url)) for name, url in urls.items()}
        count, longest = QUESTIONS[device]
        passes = Passes(make_questions(count, longest, 1), CONCURRENCY)
        found = {name: await passes.run(client, name) for name, client in clients.items()}
        write_answers(answers, passes.questions, [run for runs in found.values() for run in runs], environment(device))
        reference = THEIRS if THEIRS in clients else OURS
        scorer, result = Scorer(clients[reference], CONCURRENCY), Result()
        runs = Runs(passes.questions, found[reference], found.get(OURS, found[reference]), found.get(ROUNDED))
        both = enumerate(zip(passes.questions, runs.right.answers, strict=True))
        scored = {number: await scorer(question.prompt_ids, right.token_ids) for number, (question, right) in both}
        exact = Spread()
        if checkpoint is not None and reference == THEIRS:
            exact = find_exact(result, runs, checkpoint, NUM_EXACT, device, say)
        await judge_runs(result, runs, scored, exact, scorer)
    if result.faults:
        raise ValueError(f"answers: expected within {result.bound}, but {result.faults[0]}")
    return {"reference": reference, **asdict(result)}
