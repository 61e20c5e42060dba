"""``--dsv4-check``: integrity checks while serving, and what happens when one fails."""

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_dsv4.attention import HostLengths
from sglang_dsv4.cache import ExternalKVCache, StepPlan
from sglang_dsv4.cache.inspect.checksums import Finding, RowSums
from sglang_dsv4.cache.inspect.dump import SequenceFacts, write_dump
from sglang_dsv4.cache.regions import SequenceBatch
from sglang_dsv4.errors import CacheInvariantError, SavedFileError
from sglang_dsv4.plugin.install.options import CHECK_LEVELS

logger = logging.getLogger(__name__)

DIGESTS_KEPT = 256


class ServingChecks:
    """Keeps a checksum of every row that a step writes, and compares what the next step could read.

    ``step`` compares all that a step's requests can reach, before each of their steps; ``boundary`` only that of requests
    whose length is a whole number of pages: at every prefix hit, between chunks of a prompt, and every page while decoding.

    Args:
        cache (ExternalKVCache): over pages of SGLang.
        level (str): ``boundary`` or ``step``.
        folder (Path): where a dump goes.

    Attributes:
        num_run (int): comparisons made, one per step at most.
        num_failed (int): those that found something.
        digests (OrderedDict[str, tuple[int, str]]): with ``step``, for each of the last requests by its id: its length after
            its last step, and a digest of all that its next query could read. Two requests of the same tokens must have the
            same, a prefix hit or not, wherever they lie.
    """

    def __init__(self, cache: ExternalKVCache, level: str, folder: Path) -> None:
        if level not in CHECK_LEVELS[1:]:
            raise ValueError(f"level: expected one of {CHECK_LEVELS[1:]}, got {level!r}")
        self._cache = cache
        self._level = level
        self._folder = folder
        self._sums = RowSums(cache.storage.layers, cache.capacity)
        self.num_run = 0
        self.num_failed = 0
        self.digests: OrderedDict[str, tuple[int, str]] = OrderedDict()

    def before(self, plan: StepPlan, lengths: HostLengths, names: Sequence[str]) -> None:
        """Compare what a step is about to read.

        Args:
            plan (StepPlan): the step.
            lengths (HostLengths): its lengths.
            names (Sequence[str]): its requests' ids.

        Raises:
            CacheInvariantError: names the invariant, the request and the page; a dump was written.
        """
        begins = _begins(lengths)
        page_tokens = self._cache.spec.page_tokens
        chosen = [
            number for number, length in enumerate(begins) if length and (self._level == "step" or length % page_tokens == 0)
        ]
        if not chosen:
            return
        batch = _batch_of(plan, chosen, [begins[number] for number in chosen])
        self.num_run += 1
        finding = self._sums.verify(batch)
        if finding is not None:
            self._fail(finding, batch, [names[number] for number in chosen])

    def after(self, plan: StepPlan, lengths: HostLengths, names: Sequence[str]) -> None:
        """Keep the checksums of what a step wrote; arguments as in `before`.

        Raises:
            CacheInvariantError: some of it is not finite; a dump was written.
        """
        ends = list(lengths.seq_lens)
        batch = _batch_of(plan, list(range(len(ends))), ends)
        if self._level == "step":
            self._keep_digests(batch, names)
        finding = self._sums.record(batch, _begins(lengths))
        if finding is not None:
            self._fail(finding, batch, names)

    def facts(self) -> dict[str, Any]:
        """The level, what has been done, and what it takes."""
        return {"level": self._level, "run": self.num_run, "failed": self.num_failed, "bytes": self._sums.nbytes}

    def _fail(self, finding: Finding, batch: SequenceBatch, names: Sequence[str]) -> None:
        self.num_failed += 1
        message = finding.message(names[finding.owner])
        path = self._folder / f"dsv4-dump-{os.getpid()}-{time.time_ns()}.safetensors"
        spec = self._cache.spec
        facts: dict[str, Any] = {
            "check": self._level,
            "rows": spec.row_format,
            "index keys": spec.index_format,
            "comparisons before": self.num_run,
        }
        try:
            write_dump(path, finding, _facts_of(batch, names, spec.page_tokens), facts)
            left = f"see `python -m sglang_dsv4 inspect {path}`"
        except SavedFileError as error:
            left = f"no dump, {error}"
        # SGLang logs what ends a scheduler as one traceback among others; this line is what an operator looks for.
        logger.error("sglang_dsv4: integrity check failed, the server stops: %s; %s", message, left)
        raise CacheInvariantError(f"{message}; {left}")

    def _keep_digests(self, batch: SequenceBatch, names: Sequence[str]) -> None:
        found = self._sums.digests(batch)
        for name, length, digest in zip(names, batch.seq_lens, found, strict=True):
            self.digests.pop(name, None)
            self.digests[name] = (length, digest)
        while len(self.digests) > DIGESTS_KEPT:
            self.digests.popitem(last=False)


def _begins(lengths: HostLengths) -> list[int]:
    """Lengths before the step."""
    return [end - count for end, count in zip(lengths.seq_lens, lengths.extend_lens, strict=True)]


def _batch_of(plan: StepPlan, chosen: list[int], lengths: list[int]) -> SequenceBatch:
    step = plan.step
    slots = step.state_slots.tolist()
    return SequenceBatch(
        seq_lens=lengths,
        min_lens=lengths,
        state_slots=[slots[number] for number in chosen],
        history=step.history_pages[chosen],
        window=step.window_pages[chosen],
    )


def _facts_of(batch: SequenceBatch, names: Sequence[str], page_tokens: int) -> list[SequenceFacts]:
    facts = []
    for number, (name, length) in enumerate(zip(names, batch.seq_lens, strict=True)):
        pages = -(-length // page_tokens)
        facts.append(
            SequenceFacts(
                name=name,
                seq_len=length,
                state_slot=batch.state_slots[number],
                history_pages=batch.history[number, :pages].tolist(),
                window_pages=batch.window[number, :pages].tolist(),
            )
        )
    return facts
