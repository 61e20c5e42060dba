"""What a step does to a cache, in numbers that follow from lengths on the host."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_dsv4.spec import CacheSpec

RESTORED_BY = ("prefix_hit", "chunk", "decode")


@dataclass(frozen=True)
class StepCounts:
    """One step of a batch.

    Attributes:
        flushes (dict[int, int]): by ratio, requests with a block that closed.
        entries (dict[int, int]): by ratio, entries stored, over all layers of that ratio.
        tail_tokens (dict[int, int]): by ratio, tokens in open blocks after the step, of every running request.
        prefix_tokens (int): tokens that requests admitted with this step found in the prefix cache.
        restored (dict[str, int]): requests that went on at a page boundary, by `RESTORED_BY`: their next CSA block takes the
            b-stream of the block before it from boundary state.
    """

    flushes: dict[int, int]
    entries: dict[int, int]
    tail_tokens: dict[int, int]
    prefix_tokens: int
    restored: dict[str, int]


class StepCounter:
    """Counts the steps of one scheduler; reads nothing from a device.

    Args:
        spec (CacheSpec): what the cache holds.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self._page_tokens = spec.page_tokens
        self._num_layers = Counter(layer.ratio for layer in spec.layers if layer.ratio)
        self._unfinished: Any = None

    @property
    def ratios(self) -> tuple[int, ...]:
        """Ratios of the model's layers, window-only ones left out."""
        return tuple(sorted(self._num_layers))

    def count(self, batch: Any, running: Any) -> StepCounts:
        """Count a step. Every step of a scheduler has to come by, in order.

        Args:
            batch (Any): SGLang's ScheduleBatch, of the mode decode, extend or mixed.
            running (Any): the ScheduleBatch of all requests that decode, whether they are part of the step or not.
        """
        if batch.forward_mode.is_decode():
            ends = batch.seq_lens_cpu.numpy()
            begins = ends - 1
            restored, prefix_tokens = Counter(decode=self._at_boundary(begins)), 0
        else:
            begins = np.array(batch.prefix_lens, dtype=np.int64)
            ends = begins + np.array(batch.extend_lens, dtype=np.int64)
            restored, prefix_tokens = self._prefixes(batch)
        stored = ends
        if running is not batch and running.reqs:
            stored = np.concatenate([ends, running.seq_lens_cpu.numpy()])
        flushes, entries, tail_tokens = {}, {}, {}
        for ratio, num_layers in self._num_layers.items():
            closed = ends // ratio - begins // ratio
            flushes[ratio] = int(np.count_nonzero(closed))
            entries[ratio] = int(closed.sum()) * num_layers
            tail_tokens[ratio] = int((stored % ratio).sum())
        return StepCounts(flushes, entries, tail_tokens, prefix_tokens, dict(restored))

    def _at_boundary(self, begins: np.ndarray) -> int:
        return int(np.count_nonzero((begins > 0) & (begins % self._page_tokens == 0)))

    def _prefixes(self, batch: Any) -> tuple[Counter[str], int]:
        """How the requests of a prefill step began, and the tokens that they did not have to compute."""
        restored: Counter[str] = Counter()
        num_decoding = len(batch.decoding_reqs or ())
        num_prefilling, prefix_tokens = len(batch.reqs) - num_decoding, 0
        for number, (request, begin) in enumerate(zip(batch.reqs, batch.prefix_lens, strict=True)):
            if number >= num_prefilling:
                cause = "decode"
            elif request is self._unfinished:
                cause = "chunk"
            else:
                cause = "prefix_hit"
                prefix_tokens += begin
            restored[cause] += begin > 0 and begin % self._page_tokens == 0
        self._unfinished = batch.chunked_req
        return restored, prefix_tokens
