"""Continuous batching: which sequences take part in the next step, with how many tokens."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from sglang_dsv4.cache import StepPlan
from sglang_dsv4.errors import OutOfPagesError
from sglang_dsv4.runtime.interrupt import held_interrupts
from sglang_dsv4.runtime.job import Job
from sglang_dsv4.runtime.model import CachedModel
from sglang_dsv4.runtime.prefix_cache.index import PrefixIndex
from sglang_dsv4.runtime.sequence import LiveSequence

Share = tuple[Job, int]  # a job, and how many of its tokens a step feeds


class Scheduler:
    """Runs jobs to their end, as many at once as fit.

    Decoding sequences get one token in every step; what is left of ``chunk_tokens`` goes to prompts, oldest first. When
    pages run out, the index gives some back; then the youngest job that nobody else holds waits and starts over later.

    Args:
        model (CachedModel): computes a step.
        index (PrefixIndex): where sequences begin.
        chunk_tokens (int): tokens of a step, decoding ones aside.
        after_step (Callable[[], None]): called after each step.
    """

    def __init__(self, model: CachedModel, index: PrefixIndex, chunk_tokens: int, after_step: Callable[[], None]) -> None:
        self._model = model
        self._cache = model.cache
        self._index = index
        self._chunk_tokens = chunk_tokens
        self._after_step = after_step

    def run(self, jobs: Sequence[Job], others: Iterable[LiveSequence], on_step: Callable[[Sequence[Share]], None]) -> None:
        """Work until every job is done.

        Args:
            jobs (Sequence[Job]): sequences with or without a request.
            others (Iterable[LiveSequence]): open sequences that new ones may be forked from.
            on_step (Callable[[Sequence[Share]], None]): hears what each step fed.

        Raises:
            OutOfPagesError: a sequence does not fit though it is alone; what nobody else holds is closed.
        """
        run = _Run(self._index, deque(jobs), tuple(others))
        finished = False
        try:
            while run.waiting or run.running:
                run.admit()
                self._step(run, on_step)
            finished = True
        finally:
            if not finished:
                self._give_up(jobs)

    def _step(self, run: "_Run", on_step: Callable[[Sequence[Share]], None]) -> None:
        for job in [job for job in run.running if not job.sequence.num_pending]:
            self._advance(run, job)
        shares, plan = self._make_plan(run)
        if plan is None:
            return
        with held_interrupts():
            self._feed(shares, plan)
        for job, _ in shares:
            self._index.keep_boundary(job.sequence)
            if not job.is_prompt_fed and not job.sequence.num_pending:
                job.is_prompt_fed = True
                self._index.keep_end(job.sequence)
        self._after_step()
        on_step(shares)

    def _advance(self, run: "_Run", job: Job) -> None:
        """Sample the next token, or end a job that is done."""
        if not job.output.is_done:
            job.sample()
            return
        run.finish(job)
        if not job.stays_open:
            self._index.keep_end(job.sequence)
            self._close(job)

    def _make_plan(self, run: "_Run") -> tuple[list[Share], StepPlan | None]:
        while run.running:
            shares = self._shares(run.running)
            try:
                plan = self._cache.plan([(job.request, count) for job, count in shares])
            except OutOfPagesError as error:
                if self._index.evict():
                    continue
                victim = run.preempt()
                if victim is None:
                    tokens = len(run.running[0].sequence.tokens)
                    message = f"a sequence of {tokens} tokens does not fit beside what is held: {error}"
                    raise OutOfPagesError(message, error.pool, error.needed, error.free) from error
                self._close(victim)
                continue
            return shares, plan
        return [], None

    def _shares(self, running: Sequence[Job]) -> list[Share]:
        budget, page_tokens = self._chunk_tokens, self._cache.spec.page_tokens
        shares = []
        for job in running:
            pending = job.sequence.num_pending
            count = pending
            if pending > 1:  # up to the page's end, where the index keeps what there is
                to_boundary = page_tokens - job.sequence.num_fed % page_tokens
                count = min(pending, to_boundary, budget)
                budget -= count
            if count:
                shares.append((job, count))
        return shares

    def _feed(self, shares: Sequence[Share], plan: StepPlan) -> None:
        tokens = [token for job, count in shares for token in job.sequence.pending(count)]
        finished = False
        try:
            logits = self._model.run(plan, tokens)
            finished = True
        finally:
            if not finished:  # some layers are written and some are not
                self._cache.abandon(plan)
        for (job, _), row in zip(shares, logits, strict=True):
            job.sequence.logits = None if job.sequence.num_pending else row.clone()

    def _give_up(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.is_owned:
                self._settle(job)
            else:
                self._close(job)

    def _settle(self, job: Job) -> None:
        """Leave an owned sequence with what was fed, ready to go on."""
        sequence, request = job.sequence, job.sequence.request
        if request is None:
            return
        del sequence.tokens[max(sequence.num_fed, job.num_settled) :]
        if not sequence.num_pending and sequence.logits is None:
            # The last token is fed again, for its logits.
            self._cache.truncate(request, sequence.num_fed - 1)

    def _close(self, job: Job) -> None:
        request, job.sequence.request = job.sequence.request, None
        if request is not None:
            self._cache.close(request)


class _Run:
    """The jobs of one call: those that wait, and those that take part."""

    def __init__(self, index: PrefixIndex, waiting: deque[Job], others: tuple[LiveSequence, ...]) -> None:
        self.waiting = waiting
        self.running: list[Job] = []
        self._index = index
        self._others = others
        self._is_full = False

    def admit(self) -> None:
        """Let jobs in until the state slots are taken, or until one had to leave for lack of pages."""
        held_back = []
        while self.waiting and not (self._is_full and self.running):
            job = self.waiting.popleft()
            if self._is_being_computed(job.sequence):
                held_back.append(job)
                continue
            if job.sequence.request is None and not self._begin(job):
                held_back.append(job)
                break
            self.running.append(job)
        self.waiting.extendleft(reversed(held_back))

    def preempt(self) -> Job | None:
        """Send the youngest job that nobody else holds back to wait; None where only one job is left."""
        free = [job for job in self.running if not job.is_owned]
        if not free or len(self.running) == 1:
            return None
        self.running.remove(free[-1])
        self.waiting.appendleft(free[-1])
        self._is_full = True
        return free[-1]

    def finish(self, job: Job) -> None:
        """Take a job out; there may be room for another."""
        job.is_finished = True
        self.running.remove(job)
        self._is_full = False

    def _begin(self, job: Job) -> bool:
        try:
            self._index.begin(job.sequence, self._others)
        except OutOfPagesError:  # no state slot
            if not self.running:
                raise
            return False
        return True

    def _is_being_computed(self, sequence: LiveSequence) -> bool:
        """Whether a prompt that is being fed will soon have a longer beginning of this one in the index."""
        if sequence.request is not None:
            return False
        page_tokens = self._index.page_tokens
        for job in self.running:
            other = job.sequence
            common = _common(sequence.tokens, other.tokens) if other.num_pending > 1 else 0
            common -= common % page_tokens
            if common > max(other.num_fed, self._index.known_length(sequence.tokens)):
                return True
        return False


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
