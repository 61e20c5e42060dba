"""The result of a comparison: how far apart right answers may be, and whether these are closer."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_dsv4.check.bound import Spread, backend_bound, run_spread, spread_of
from sglang_dsv4.check.compare.answers import Run, Scorer, read_answers
from sglang_dsv4.check.compare.exact import exact_differences, expect_of_checkpoint
from sglang_dsv4.check.judge import Verdict, judge
from sglang_dsv4.check.reply import Question, Token
from sglang_dsv4.check.server import OURS, ROUNDED, THEIRS

Say = Callable[[str], None]


@dataclass(frozen=True)
class Runs:
    """Answers to judge.

    Attributes:
        questions (list[Question]): what was asked.
        reference (list[Run]): of the backend whose answers count as right; of the first, `right`, all are compared with.
        judged (list[Run]): of the other.
        rounded (list[Run] | None): of the judged backend with the reference's row format, where its own is another one.
    """

    questions: list[Question]
    reference: list[Run]
    judged: list[Run]
    rounded: list[Run] | None = None

    @property
    def right(self) -> Run:
        """What every judged run is compared with."""
        return self.reference[0]

    def bound(self, scored: dict[int, list[Token]], exact: Spread) -> dict[str, float]:
        """`backend_bound` of these runs."""
        reference, judged = ([run.answers for run in runs] for runs in (self.reference, self.judged))
        rounded = None if self.rounded is None else [run.answers for run in self.rounded]
        return backend_bound(reference, judged, rounded, scored, exact)


@dataclass
class Result:
    """What a comparison found; no ``faults`` means that all is right.

    ``lost`` has the reference's servers that crashed, and how: what is judged is compared with the others.
    """

    bound: dict[str, float] = field(default_factory=dict)
    from_exact: dict[str, dict[str, float]] = field(default_factory=dict)
    own: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    verdicts: dict[str, dict[str, object]] = field(default_factory=dict)
    planted: list[dict[str, Any]] = field(default_factory=list)
    bytes: dict[str, Any] | None = None
    faults: list[str] = field(default_factory=list)


def find_exact(result: Result, runs: Runs, checkpoint: Path, count: int, device: str, say: Say) -> Spread:
    """How far the reference is from exact arithmetic, over ``count`` answers; and the judged backend, for comparison.

    Raises:
        ValueError: the reference's answers are not those of the checkpoint.
    """
    say(f"{count} answers of either backend in exact arithmetic")
    for name, run in (("reference", runs.right), ("judged", runs.judged[0])):
        differences = exact_differences(checkpoint, runs.questions, run.answers, count, device)
        result.from_exact[name] = asdict(spread_of(differences))
    exact = Spread(**result.from_exact["reference"])
    expect_of_checkpoint(exact, runs.right.answers, checkpoint)
    return exact


async def judge_runs(result: Result, runs: Runs, scored: dict[int, list[Token]], exact: Spread, scorer: Scorer | None) -> None:
    """Compare every judged run with the reference's first; findings go to ``result``.

    Args:
        result (Result): of all.
        runs (Runs): the answers.
        scored (dict[int, list[Token]]): the reference's scores of its own tokens, by question; they widen its own rounding.
        exact (Spread): how far the reference is from exact arithmetic; zero where that is not known.
        scorer (Scorer | None): scores of the reference's server; None: nothing is compared behind a parting.
    """
    result.bound = runs.bound(scored, exact)
    every = [*runs.reference, *runs.judged, *(runs.rounded or ())]
    sides: dict[str, list[Run]] = {}
    for run in every:
        sides.setdefault(run.name.rsplit(" ", 1)[0], []).append(run)
    for name, (cold, hit, again) in sides.items():
        result.own[name] = {
            "hit": asdict(run_spread(cold.answers, hit.answers)),
            "again": asdict(run_spread(cold.answers, again.answers)),
        }
    for run in (*runs.reference, *runs.judged):
        pairs = zip(runs.right.answers, run.answers, strict=True)
        identical = sum(right.token_ids == answer.token_ids for right, answer in pairs)
        facts = {"cached_tokens": run.cached_tokens, "identical": identical}
        result.runs.append({"name": run.name, **facts})
        if run.name.endswith(" hit") and not run.cached_tokens:
            result.faults.append(f"{run.name}: expected prefix hits, got none")
    for run in runs.judged:
        verdict = await _judge_run(runs, run, result.bound, scorer)
        result.verdicts[run.name] = verdict.to_dict()
        result.faults += verdict.faults[:3]


def kept_runs(file: Path) -> tuple[Runs, dict[str, Any] | None]:
    """What an earlier comparison of our cache with SGLang's own kept.

    Args:
        file (Path): what `write_answers` wrote.

    Returns:
        tuple[Runs, dict[str, Any] | None]: the answers, and the environment of the servers if it was kept.

    Raises:
        ValueError: it is another file, or one of the two backends has no answers there.
    """
    questions, found, where = read_answers(file)
    sides: dict[str, list[Run]] = {THEIRS: [], ROUNDED: [], OURS: []}
    for run in found.values():
        name = next((name for name in sides if run.name.startswith(f"{name}-")), None)
        if name is not None:
            sides[name].append(run)
    for name in (THEIRS, OURS):
        if not sides[name]:
            raise ValueError(f"{file}: expected answers of {name}, got those of {sorted(found)}")
    return Runs(questions, sides[THEIRS], sides[OURS], sides[ROUNDED] or None), where


async def judge_kept(runs: Runs, checkpoint: Path, count: int, device: str, say: Say) -> Result:
    """Judge answers without servers: nothing is compared behind a parting.

    Args:
        runs (Runs): of `kept_runs`.
        checkpoint (Path): what was served.
        count (int): answers that are computed exactly; 0 for none.
        device (str): where.
        say (Say): told before a long wait.

    Raises:
        ValueError: another model answered.
    """
    result, exact = Result(), Spread()
    if count:
        exact = find_exact(result, runs, checkpoint, count, device, say)
    await judge_runs(result, runs, {}, exact, None)
    return result


async def _judge_run(runs: Runs, run: Run, bound: dict[str, float], scorer: Scorer | None) -> Verdict:
    verdict = Verdict()
    if scorer is not None:
        await scorer.prepare(runs.questions, runs.right.answers, run.answers)
    triples = zip(runs.questions, runs.right.answers, run.answers, strict=True)
    for number, (question, right, answer) in enumerate(triples):
        name = f"{run.name}: question {number}"
        await judge(verdict, name, question, right, answer, bound["bound"], scorer)
    if verdict.typical > bound["typical_bound"]:
        text = f"log-probabilities are typically {verdict.typical:.3g} off, expected at most {bound['typical_bound']:.3g}"
        verdict.faults.insert(0, f"{run.name}: {text}")
    return verdict
