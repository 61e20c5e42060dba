"""The result of a stress test, as plain values."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sglang_dsv4.check.client import GENERATE
from sglang_dsv4.check.stress.control import has_logprobs, is_served
from sglang_dsv4.check.stress.judging import Judge
from sglang_dsv4.check.stress.load import Load, Sample
from sglang_dsv4.check.stress.replies import Outcome

GIVEN = "given"


@dataclass(frozen=True)
class Run:
    """Everything a stress test found.

    Attributes:
        target (str): ``URL``, ``--tiny`` or ``--runtime CHECKPOINT``: how the command names it.
        load (Load): what was asked.
        outcomes (Sequence[Outcome]): what came back.
        judge (Judge): of all outcomes.
        bound_origin (str): how its bound was found.
        control (Sequence[str]): what the judge said of an answer to a wrong prompt; empty if it noticed nothing.
        leaks (Sequence[str]): what was still held at the end.
        start (dict[str, Any]): the plug-in's facts before the load.
        end (dict[str, Any]): and after it.
        samples (Sequence[Sample]): the pools in between.
        load_s (float): seconds of the load.
    """

    target: str
    load: Load
    outcomes: Sequence[Outcome]
    judge: Judge
    bound_origin: str
    control: Sequence[str]
    leaks: Sequence[str]
    start: dict[str, Any]
    end: dict[str, Any]
    samples: Sequence[Sample]
    load_s: float

    @property
    def faults(self) -> list[str]:
        """Everything wrong, one line each; a mismatch with the command that sends its request again."""
        faults = [
            f"request {outcome.case.number} ({outcome.case.workload}): {fault}; again: {self.again(outcome)}"
            for outcome, fault in self.judge.mismatches
        ]
        faults += self.leaks
        before, after = (facts["report"]["total_bytes"] for facts in (self.start, self.end))
        if before != after:
            faults.append(f"leak: the cache had {before} bytes at the start, and has {after}")
        if not self.control:
            faults.append("control: an answer to a wrong prompt was not noticed; the comparison proves nothing")
        return faults

    def again(self, outcome: Outcome) -> str:
        """The command that sends a request again, beside those that were in flight with it."""
        first = max(self.load.first, outcome.case.number - self.load.concurrency)
        bound = f" --bound {self.judge.bound}" if self.bound_origin == GIVEN else ""
        return (
            f"python -m sglang_dsv4 stress {self.target} --seed {self.load.seed} --first {first} "
            f"--requests {outcome.case.number - first + 1} --concurrency {self.load.concurrency}{bound}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, by name."""
        answers = [answer for outcome in self.outcomes for answer in outcome.answers]
        reports_all = self.end.get("enable_cache_report")
        reporting = [o for o in self.outcomes if o.case.endpoint == GENERATE or reports_all]
        counts = [(answer.cached_tokens, answer.prompt_tokens) for outcome in reporting for answer in outcome.answers]
        cached, prompt_tokens = map(sum, zip(*counts, strict=True)) if counts else (0, 0)
        return {
            "target": self.target,
            "load": asdict(self.load),
            "requests": len(self.outcomes),
            "requests_by_workload": dict(Counter(o.case.workload for o in self.outcomes)),
            "answers_compared": self.judge.verdict.answers,
            "tokens_compared": self.judge.verdict.tokens,
            "references": self.judge.num_references,
            "doubts": self.judge.verdict.partings,
            "uncompared_tails": self.judge.verdict.uncompared,
            "bound": self.judge.bound,
            "bound_origin": self.bound_origin,
            "largest_difference": self.judge.verdict.largest,
            "control": list(self.control),
            "finish": dict(Counter(str(answer.finish) for answer in answers)),
            "cached_share": cached / prompt_tokens if prompt_tokens else 0.0,
            "retractions": sum(answer.retractions for answer in answers),
            "lost_logprobs": sum(
                has_logprobs(answer) and any(token.logprob is None for token in answer.tokens or ()) for answer in answers
            ),
            "load_s": self.load_s,
            "seconds": percentiles([o.seconds for o in self.outcomes if is_served(o) and not o.case.pause_s]),
            "first_token_s": percentiles([o.first_s for o in self.outcomes if o.first_s]),
            "usage_start": self.start["usage"],
            "usage_end": self.end["usage"],
            "memory_start": self.start["memory"],
            "memory_half": self.samples[len(self.samples) // 2].memory if self.samples else {},
            "memory_end": self.end["memory"],
            "cache_bytes": self.end["report"]["total_bytes"],
            "samples": [asdict(sample) for sample in self.samples],
            "faults": self.faults,
        }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 90th, 99th and largest; empty without values."""
    if not seconds:
        return {}
    return dict(zip(("p50", "p90", "p99", "max"), np.quantile(seconds, (0.5, 0.9, 0.99, 1.0)).tolist(), strict=True))
