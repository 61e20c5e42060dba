"""DeepSeek-V4 in this process, over a `CompressedKVCache`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_dsv4.cache import CompressedKVCache, Request, Snapshot, prune_saved
from sglang_dsv4.cache.pages.room import Growth
from sglang_dsv4.cache.persist.prune import Pruned
from sglang_dsv4.errors import OutOfPagesError, SavedFileError
from sglang_dsv4.runtime.checkpoint import load_checkpoint
from sglang_dsv4.runtime.handle import Handle, HandleSnapshot, Sink
from sglang_dsv4.runtime.job import Job
from sglang_dsv4.runtime.model import CachedModel
from sglang_dsv4.runtime.output import Completion, Output, Stop, StopRule
from sglang_dsv4.runtime.prefix_cache.eviction import check_room, make_room
from sglang_dsv4.runtime.prefix_cache.index import PrefixIndex
from sglang_dsv4.runtime.sampling import Sampler
from sglang_dsv4.runtime.saved import pack_sequence, unpack_sequence
from sglang_dsv4.runtime.scheduler import Scheduler, Share
from sglang_dsv4.runtime.sequence import LiveSequence
from sglang_dsv4.runtime.show.picture import Picture, draw_sequence
from sglang_dsv4.runtime.show.progress import token_progress
from sglang_dsv4.runtime.show.report import RuntimeReport, make_report
from sglang_dsv4.runtime.text import Text
from sglang_dsv4.spec import INDEX_FORMAT_OF_ROWS, CacheSpec

Prompt = str | Sequence[int] | Handle


class Runtime:
    """A transformers model whose attention reads and writes our cache.

    The model's modules and weights are transformers'; what touches the cache is replaced. Prompts that begin alike share
    pages, and a prompt that repeats or extends an earlier one continues from that one's last token.

    Args:
        checkpoint (str | Path): a directory, or a name that transformers resolves.
        device (str | torch.device): where model and cache live.
        dtype (str | torch.dtype): of the model: ``"auto"`` (the checkpoint's), float32 or bfloat16.
        num_pages (int): history pages of the cache.
        max_requests (int): sequences open at once.
        chunk_tokens (int): prompt tokens of a step.
        max_ends (int): points between page boundaries that the prefix index keeps; each holds a copy of a stream state.
        debug (bool): check the cache's invariants after every step.
        **spec_options (Any): ``page_tokens``, ``row_format``, ``index_format``, and ``max_draft_tokens``: the tokens by
            which a handle can be rolled back.

    Raises:
        UnsupportedError: not a DeepSeek-V4 checkpoint, or a row format that is not implemented.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        num_pages: int = 512,
        max_requests: int = 16,
        chunk_tokens: int = 256,
        max_ends: int = 64,
        debug: bool = False,
        **spec_options: Any,
    ) -> None:
        if chunk_tokens <= 0 or max_ends < 0:
            raise ValueError(f"expected chunk_tokens > 0 and max_ends >= 0, got {chunk_tokens} and {max_ends}")
        loaded = load_checkpoint(checkpoint, torch.device(device), dtype)
        config = loaded.model.config
        self.spec = CacheSpec.from_hf(config, **_spec_options(**spec_options))
        # Sequences in work hold two or three window pages each; the index can use more, one for each boundary it keeps.
        self.cache = CompressedKVCache(
            self.spec,
            num_pages=num_pages,
            num_window_pages=min(num_pages, 4 * max_requests + num_pages // 8),
            max_requests=max_requests,
            device=device,
        )
        self.model = CachedModel(loaded.model, self.cache)
        self.text = Text(loaded.tokenizer, int(config.vocab_size), loaded.name)
        self.index = PrefixIndex(self.cache, max_ends)
        self.orphans: list[LiveSequence | Snapshot] = []  # of handles and snapshots that are gone
        self._eos_ids = loaded.eos_ids
        self._name = loaded.name
        self._debug = debug
        self._live: list[LiveSequence] = []
        self._scheduler = Scheduler(self.model, self.index, chunk_tokens, self._check)

    def open(self, text_or_ids: str | Sequence[int], *, stream: bool | Sink = False) -> Handle:
        """Start a sequence with a prompt.

        Args:
            text_or_ids (str | Sequence[int]): a text, or token ids.
            stream (bool | Sink): what `Handle.generate` does with text as it comes: True prints it, a function gets it.

        Raises:
            OutOfPagesError: it does not fit; nothing was changed.
            UnsupportedError: a text, and the checkpoint has no tokenizer.
            ValueError: no token, or an id out of range.
            TypeError: an id that is no integer.
        """
        self.collect()
        sequence = LiveSequence(self.text.encode(text_or_ids))
        self._check_prompt(sequence)
        self._run([Job(sequence, self._silent(), Sampler(0.0, 0), stays_open=True)], progress=False)
        return self.adopt(sequence, stream)

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Stop | None = None,
        sink: Sink | None = None,
        progress: bool = True,
    ) -> list[Completion]:
        """Continue many prompts at once, in one batch that others join as soon as there is room.

        Args:
            prompts (Sequence[Prompt]): texts and token ids, whose sequences end with the call; and handles, which grow.
            max_new_tokens (int): for each, at most.
            temperature (float): as in `Handle.generate`.
            seed (int | None): of the first prompt's draws; the next one's is one more.
            stop (Stop | None): as in `Handle.generate`.
            sink (Sink | None): gets every prompt's text as it comes.
            progress (bool): show a progress bar.

        Returns:
            list[Completion]: one for each prompt.

        Raises:
            OutOfPagesError: a sequence does not fit though it is alone, or the handles do not fit together.
            UnknownRequestError: a handle is closed.
            ValueError: an argument out of range.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected 0 or more, got {max_new_tokens}")
        self.collect()
        rule = StopRule(stop, self._eos_ids)
        jobs = []
        for number, prompt in enumerate(prompts):
            sampler = Sampler(temperature, None if seed is None else seed + number)
            output = Output(self.text, rule, max_new_tokens, sink)
            if isinstance(prompt, Handle):
                sequence = prompt.live()
                if not sequence.tokens:
                    raise ValueError(f"{prompt}: expected at least one token, got none")
                jobs.append(self._owned_job(sequence, output, sampler))
            else:
                jobs.append(Job(LiveSequence(self.text.encode(prompt)), output, sampler))
        if len({id(job.sequence) for job in jobs}) != len(jobs):
            raise ValueError("prompts: expected each handle once")
        for job in jobs:
            if not job.is_owned:
                self._check_prompt(job.sequence)
        owned = [job.sequence for job in jobs if job.is_owned]
        self._make_room([(s, s.num_pending + max_new_tokens) for s in owned])
        self._run(jobs, progress)
        return [job.output.completion(job.sequence.cached_tokens) for job in jobs]

    def save(self, handle: Handle, path: str | Path) -> None:
        """Write a sequence to disk; another process with the same checkpoint can go on from there.

        Raises:
            SavedFileError: it cannot be written; nothing was left behind.
            UnknownRequestError: closed.
        """
        sequence = handle.live()
        assert sequence.request is not None, "a live handle has a request"
        self.cache.save(sequence.request, Path(path), extra=pack_sequence(sequence))

    def load(self, path: str | Path) -> Handle:
        """Read a sequence that `save` wrote.

        Raises:
            OutOfPagesError: no room; nothing was changed.
            SavedFileError: missing, damaged, or of another spec; nothing was changed.
        """
        self.collect()
        request = self._load(Path(path))
        sequence = unpack_sequence(request.extra, request.seq_len, self.cache.device)
        if sequence is None:
            self.cache.close(request)
            raise SavedFileError(f"{path}: expected a sequence that Runtime.save wrote, got no tokens")
        sequence.request = request
        sequence.cached_tokens = request.seq_len
        return self.adopt(sequence)

    @staticmethod
    def prune(folder: str | Path, *, dry_run: bool = False) -> Pruned:
        """Remove pages of saved sequences that no manifest names any more; see `sglang_dsv4.cache.prune_saved`.

        Deleting a saved sequence is deleting its manifest, and this.
        """
        return prune_saved(folder, dry_run=dry_run)

    def restore(self, snapshot: HandleSnapshot) -> Handle:
        """Start a sequence that continues from a snapshot; the snapshot stays.

        Raises:
            OutOfPagesError: every state slot is taken; nothing was changed.
            UnknownRequestError: the snapshot was released.
        """
        self.collect()
        kept, sequence = snapshot.sequence()
        sequence.request = self.cache.restore(kept)
        sequence.cached_tokens = sequence.num_fed
        return self.adopt(sequence)

    def report(self) -> RuntimeReport:
        """Where the bytes are, who holds them, and how often prefixes were found."""
        self.collect()
        return make_report(self._name, self.cache, self.index, self._live, self.text)

    def adopt(self, sequence: LiveSequence, stream: bool | Sink = False) -> Handle:
        """A handle of an open sequence."""
        self._live.append(sequence)
        return Handle(self, sequence, stream)

    def extend(self, sequence: LiveSequence, tokens: Sequence[int]) -> None:
        """Feed an open sequence more tokens; see `Handle.append`."""
        self.collect()
        self._make_room([(sequence, sequence.num_pending + len(tokens))])
        job = self._owned_job(sequence, self._silent(), Sampler(0.0, 0))
        sequence.tokens.extend(tokens)
        self._run([job], progress=False)

    def truncate(self, sequence: LiveSequence, n: int) -> None:
        """Roll an open sequence back; see `Handle.truncate`."""
        assert sequence.request is not None, "a live handle has a request"
        if n == len(sequence.tokens):
            return
        del sequence.tokens[n:]
        # One token less: it is fed again with the next step, which gives the logits behind it.
        self.cache.truncate(sequence.request, min(sequence.num_fed, max(0, n - 1)))
        sequence.logits = None

    def picture(self, sequence: LiveSequence) -> Picture:
        """See `Handle.show`."""
        return draw_sequence(self.cache, sequence, self.text)

    def collect(self) -> None:
        """Close what belonged to handles and snapshots that are closed, or that nobody refers to any more.

        They are only noted when they go: that may happen at any time, also inside a step.
        """
        while self.orphans:
            gone = self.orphans.pop()
            if isinstance(gone, Snapshot):
                self.cache.close(gone)
                continue
            self._live = [sequence for sequence in self._live if sequence is not gone]
            if gone.request is not None:
                self.index.keep_end(gone)
                self.cache.close(gone.request)
                gone.request = None

    def _load(self, path: Path) -> Request:
        while True:
            try:
                return self.cache.load(path)
            except OutOfPagesError as error:
                # The index holds pages, but no state slot.
                if error.pool == "state slots" or not self.index.evict():
                    raise

    @staticmethod
    def _owned_job(sequence: LiveSequence, output: Output, sampler: Sampler) -> Job:
        settled = len(sequence.tokens)
        return Job(sequence, output, sampler, is_owned=True, num_settled=settled, stays_open=True)

    def _silent(self) -> Output:
        return Output(self.text, StopRule((), ()), max_new_tokens=0)

    def _check_prompt(self, sequence: LiveSequence) -> None:
        """Raise unless a new sequence can fit beside what is held now, the index aside."""
        check_room(self.cache, self.index, [self.index.growth(sequence.tokens, self._live)])

    def _make_room(self, growth: Sequence[tuple[LiveSequence, int]]) -> None:
        requests = ((sequence.request, count) for sequence, count in growth)
        make_room(
            self.cache, self.index, [Growth(r.pages, r.seq_len, r.seq_len + count) for r, count in requests if r is not None]
        )

    def _run(self, jobs: Sequence[Job], progress: bool) -> None:
        started = sum(job.left for job in jobs)
        with token_progress(started, enabled=progress) as show:

            def on_step(shares: Sequence[Share]) -> None:
                done = sum(len(job.output.tokens) for job in jobs)
                left = sum(job.left for job in jobs)
                show(started - left, f"{len(shares)} in the batch, {done} new tokens")

            self._scheduler.run(jobs, self._live, on_step)

    def _check(self) -> None:
        if self._debug:
            self.cache.check_integrity(memory=True)


def _spec_options(
    row_format: str = "bf16", index_format: str | None = None, max_draft_tokens: int = 8, **rest: Any
) -> dict[str, Any]:
    # One draft token more than the user asked for: the token before the new end is fed again, for its logits.
    return {
        "row_format": row_format,
        "index_format": index_format or INDEX_FORMAT_OF_ROWS.get(row_format, "bf16"),
        "max_draft_tokens": max_draft_tokens + 1,
        **rest,
    }
