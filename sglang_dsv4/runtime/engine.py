"""What `Runtime` and its handles work with: one model over one cache, and the sequences that are open."""

from collections.abc import Callable, Sequence
from functools import wraps
from threading import RLock
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from sglang_dsv4.cache import CompressedKVCache, Request, Snapshot
from sglang_dsv4.cache.pages.room import Growth
from sglang_dsv4.errors import UnknownRequestError
from sglang_dsv4.runtime.arguments import whole_number
from sglang_dsv4.runtime.job import Job
from sglang_dsv4.runtime.model import CachedModel
from sglang_dsv4.runtime.output import Completion, Output, Stop, StopRule
from sglang_dsv4.runtime.prefix_cache.eviction import check_room, make_room
from sglang_dsv4.runtime.prefix_cache.index import PrefixIndex
from sglang_dsv4.runtime.sampling import Sampler
from sglang_dsv4.runtime.scheduler import Scheduler, Share
from sglang_dsv4.runtime.sequence import LiveSequence
from sglang_dsv4.runtime.show.progress import token_progress
from sglang_dsv4.runtime.text import Text

Sink = Callable[[str], Any]


class Engine:
    """Opens, continues and closes sequences. One thread at a time: callers hold ``lock``.

    Args:
        model (CachedModel): computes steps.
        text (Text): the tokenizer.
        eos_ids (frozenset[int]): tokens that end a text.
        max_ends (int): ends that the prefix index keeps.
        chunk_tokens (int): prompt tokens of a step.
        debug (bool): check the cache's invariants after every step.

    Attributes:
        lock (RLock): held by whoever works with the engine.
        index (PrefixIndex): where new sequences begin.
        live (list[LiveSequence]): sequences that a handle holds.
        orphans (list[LiveSequence | Snapshot]): those of handles and snapshots that are gone, until `collect`.
    """

    def __init__(
        self, model: CachedModel, text: Text, eos_ids: frozenset[int], *, max_ends: int, chunk_tokens: int, debug: bool
    ) -> None:
        self.lock = RLock()
        self.model = model
        self.cache: CompressedKVCache = model.cache
        self.text = text
        self.index = PrefixIndex(self.cache, max_ends)
        self.live: list[LiveSequence] = []
        self.orphans: list[LiveSequence | Snapshot] = []
        self._eos_ids = eos_ids
        self._debug = debug
        self._scheduler = Scheduler(model, self.index, chunk_tokens, self._check)

    def open(self, tokens: list[int]) -> LiveSequence:
        """Compute a prompt; see `Runtime.open`."""
        sequence = LiveSequence(tokens)
        self._check_prompt(sequence)
        self._run([Job(sequence, self._silent(), Sampler(0.0, 0), stays_open=True)], progress=False)
        return self.adopt(sequence)

    def generate(
        self,
        prompts: Sequence[LiveSequence | list[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Stop | None = None,
        sink: Sink | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Continue open sequences, and prompts that end with the call; see `Runtime.generate`."""
        rule = StopRule(stop, self._eos_ids)
        first_seed = None if seed is None else whole_number("seed", seed)
        jobs = []
        for number, prompt in enumerate(prompts):
            sampler = Sampler(temperature, None if first_seed is None else first_seed + number)
            output = Output(self.text, rule, max_new_tokens, sink)
            if isinstance(prompt, LiveSequence):
                jobs.append(self._owned_job(prompt, output, sampler))
            else:
                jobs.append(Job(LiveSequence(prompt), output, sampler))
                self._check_prompt(jobs[-1].sequence)
        if len({id(job.sequence) for job in jobs}) != len(jobs):
            raise ValueError("prompts: expected each handle once")
        owned = [job.sequence for job in jobs if job.is_owned]
        self._make_room([(sequence, sequence.num_pending + max_new_tokens) for sequence in owned])
        self._run(jobs, progress)
        return [job.output.completion(job.sequence.cached_tokens) for job in jobs]

    def extend(self, sequence: LiveSequence, tokens: Sequence[int]) -> None:
        """Feed an open sequence more tokens; see `Handle.append`."""
        self._make_room([(sequence, sequence.num_pending + len(tokens))])
        job = self._owned_job(sequence, self._silent(), Sampler(0.0, 0))
        sequence.tokens.extend(tokens)
        self._run([job], progress=False)

    def fork(self, sequence: LiveSequence) -> LiveSequence:
        """See `Handle.fork`."""
        request = self.cache.fork(request_of(sequence))
        return self.adopt(
            LiveSequence(
                list(sequence.tokens), request, sequence.logits, cached_tokens=sequence.num_fed, is_foreign=sequence.is_foreign
            )
        )

    def truncate(self, sequence: LiveSequence, n: int) -> None:
        """Roll an open sequence back; see `Handle.truncate`."""
        if n == len(sequence.tokens):
            return
        del sequence.tokens[n:]
        # One token less: it is fed again with the next step, which gives the logits behind it.
        self.cache.truncate(request_of(sequence), min(sequence.num_fed, max(0, n - 1)))
        sequence.logits = None

    def restore(self, kept: Snapshot, sequence: LiveSequence) -> LiveSequence:
        """Start a sequence that continues from a snapshot of another; see `Runtime.restore`."""
        sequence.request = self.cache.restore(kept)
        sequence.cached_tokens = sequence.num_fed
        return self.adopt(sequence)

    def adopt(self, sequence: LiveSequence) -> LiveSequence:
        """Count a sequence among those that a handle holds."""
        self.live.append(sequence)
        return sequence

    def collect(self) -> None:
        """Close what belonged to handles and snapshots that are closed, or that nobody refers to any more.

        They are only noted when they go: that may happen at any time, also inside a step.
        """
        while self.orphans:
            gone = self.orphans.pop()
            if isinstance(gone, Snapshot):
                self.cache.close(gone)
                continue
            self.live = [sequence for sequence in self.live if sequence is not gone]
            if gone.request is not None:
                self.index.keep_end(gone)
                self.cache.close(gone.request)
                gone.request = None

    @staticmethod
    def _owned_job(sequence: LiveSequence, output: Output, sampler: Sampler) -> Job:
        settled = len(sequence.tokens)
        return Job(sequence, output, sampler, is_owned=True, num_settled=settled, stays_open=True)

    def _silent(self) -> Output:
        return Output(self.text, StopRule((), ()), max_new_tokens=0)

    def _check_prompt(self, sequence: LiveSequence) -> None:
        """Raise unless a new sequence can fit beside what is held now, the index aside."""
        check_room(self.cache, self.index, [self.index.growth(sequence.tokens, self.live)])

    def _make_room(self, growth: Sequence[tuple[LiveSequence, int]]) -> None:
        requests = ((sequence.request, count) for sequence, count in growth)
        grown = [Growth(r.pages, r.seq_len, r.seq_len + count) for r, count in requests if r is not None]
        make_room(self.cache, self.index, grown)

    def _run(self, jobs: Sequence[Job], progress: bool) -> None:
        started = sum(job.left for job in jobs)
        with token_progress(started, enabled=progress) as show:

            def on_step(shares: Sequence[Share]) -> None:
                done = sum(len(job.output.tokens) for job in jobs)
                left = sum(job.left for job in jobs)
                show(started - left, f"{len(shares)} in the batch, {done} new tokens")

            self._scheduler.run(jobs, self.live, on_step)

    def _check(self) -> None:
        if self._debug:
            self.cache.check_integrity(memory=True)


def request_of(sequence: LiveSequence) -> Request:
    """The request of a sequence that is open.

    Raises:
        UnknownRequestError: it was closed.
    """
    if sequence.request is None:
        raise UnknownRequestError("expected an open sequence, got a closed one")
    return sequence.request


class _HasEngine(Protocol):
    @property
    def engine(self) -> Engine: ...


_Self = TypeVar("_Self", bound=_HasEngine)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def locked(method: Callable[Concatenate[_Self, _P], _R]) -> Callable[Concatenate[_Self, _P], _R]:
    """A method that holds its engine's lock, and first closes what belonged to handles that are gone.

    Another thread's call waits until it has returned. Within it, the same thread may call further methods.
    """

    @wraps(method)
    def call(self: _Self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self.engine.lock:
            self.engine.collect()
            return method(self, *args, **kwargs)

    return call
