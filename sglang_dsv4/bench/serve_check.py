"""Answers are compared before anything is timed."""

from pathlib import Path
from typing import Any

from sglang_dsv4.check.bound import Spread, spread_of
from sglang_dsv4.check.client import Client
from sglang_dsv4.check.compare.answers import Passes, Scorer, write_answers
from sglang_dsv4.check.compare.exact import exact_differences, expect_of_checkpoint
from sglang_dsv4.check.compare.questions import make_questions
from sglang_dsv4.check.compare.result import Runs
from sglang_dsv4.check.judge import Verdict, judge
from sglang_dsv4.check.machine import environment
from sglang_dsv4.check.server import OURS, ROUNDED, THEIRS

CONCURRENCY = 8
NUM_EXACT = 8  # answers that transformers computes: on a CPU a second or two each


async def check(
    urls: dict[str, str], count: int, longest: int, checkpoint: Path | None, answers: Path, device: str
) -> dict[str, Any]:
    """Compare answers of ours, cold and at hits, with the reference's.

    The reference is SGLang's own cache, or ours where that does not run; its rounding is how far it is from itself.

    Args:
        urls (dict[str, str]): of the servers by side; `ROUNDED` is ours with the reference's row format.
        count (int): questions.
        longest (int): tokens of a prompt, at most.
        checkpoint (Path | None): what is served, where transformers can compute it in fp32: SGLang's own cache may be as far
            from ours as twice its distance from that.
        answers (Path): where the answers are kept.
        device (str): where transformers computes.

    Returns:
        dict[str, Any]: the bound, and what was found.

    Raises:
        ValueError: an answer is wrong; names it.
    """
    clients = {name: Client(url) for name, url in urls.items()}
    passes = Passes(make_questions(count, longest, 1), CONCURRENCY)
    found = {name: await passes.run(client, name) for name, client in clients.items()}
    every = [run for runs in found.values() for run in runs]
    write_answers(answers, passes.questions, every, environment(device))
    reference = THEIRS if THEIRS in clients else OURS
    scorer = Scorer(clients[reference], CONCURRENCY)

    cold, judged = found[reference][0], found.get(OURS, [])
    scored = {
        number: await scorer(question.prompt_ids, cold.answers[number].token_ids)
        for number, question in enumerate(passes.questions)
    }
    exact = Spread()
    if checkpoint is not None and reference == THEIRS:
        differences = exact_differences(checkpoint, passes.questions, cold.answers, NUM_EXACT, device)
        exact = spread_of(differences)
        expect_of_checkpoint(exact, cold.answers, checkpoint)
    bound = Runs(passes.questions, found[reference], judged or found[reference], found.get(ROUNDED)).bound(scored, exact)
    verdict = Verdict()
    for run in judged:
        for number, answer in enumerate(run.answers):
            name, question = f"{run.name}: question {number}", passes.questions[number]
            await judge(verdict, name, question, cold.answers[number], answer, bound["bound"], scorer)
    for client in clients.values():
        await client.close()
    if verdict.typical > bound["typical_bound"]:
        raise ValueError(f"answers: expected within {bound} as a rule, got {verdict.typical:.3g}")
    if verdict.faults:
        raise ValueError(f"answers: expected within {bound}, but {verdict.faults[0]}")
    return {"reference": reference, **bound, **verdict.to_dict()}
