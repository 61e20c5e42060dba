"""DeepSeek-V4 in this process, over a `CompressedKVCache`."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from sglang_dsv4.cache import CompressedKVCache, Request, prune_saved
from sglang_dsv4.cache.persist.prune import Pruned
from sglang_dsv4.cache.regions import Owner
from sglang_dsv4.errors import OutOfPagesError, SavedFileError
from sglang_dsv4.runtime.arguments import whole_number
from sglang_dsv4.runtime.checkpoint import check_dtype, load_checkpoint, load_spec
from sglang_dsv4.runtime.engine import Engine, Sink, locked, request_of
from sglang_dsv4.runtime.handle import Handle, HandleSnapshot
from sglang_dsv4.runtime.memory import check_device, check_fits
from sglang_dsv4.runtime.model import CachedModel
from sglang_dsv4.runtime.output import Completion, Stop
from sglang_dsv4.runtime.saved import WEIGHTS, pack_sequence, unpack_sequence
from sglang_dsv4.runtime.sequence import LiveSequence
from sglang_dsv4.runtime.show.report import RuntimeReport, make_report
from sglang_dsv4.runtime.text import Text
from sglang_dsv4.runtime.weights import fingerprint
from sglang_dsv4.spec import INDEX_FORMAT_OF_ROWS

Prompt = str | Sequence[int] | Handle


class Runtime:
    """A transformers model whose attention reads and writes our cache.

    The model's modules and weights are transformers'; what touches the cache is replaced. Prompts that begin alike share
    pages, and a prompt that repeats or extends an earlier one continues from that one's last token.

    Threads may share a runtime and its handles: one method runs at a time, and a call from another thread waits for it.

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

    Attributes:
        spec (CacheSpec): what its cache holds.
        cache (CompressedKVCache): the cache.
        text (Text): the tokenizer: ``encode`` and ``decode``.
        engine (Engine): what does the work, for tests and tools.

    Raises:
        UnsupportedError: no DeepSeek-V4 checkpoint, damaged files, a device that is not there, a cache larger than its memory, or
            a row format that is not implemented.
        ValueError, TypeError: an argument out of range, or of another type.
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
        num_pages = whole_number("num_pages", num_pages, least=1)
        max_requests = whole_number("max_requests", max_requests, least=1)
        chunk_tokens = whole_number("chunk_tokens", chunk_tokens, least=1)
        max_ends = whole_number("max_ends", max_ends, least=0)
        place = check_device(device)
        check_dtype(dtype)
        self.spec = load_spec(checkpoint, **_spec_options(**spec_options))
        # Sequences in work hold two or three window pages each; the index can use more, one for each boundary it keeps.
        num_window_pages = min(num_pages, 4 * max_requests + num_pages // 8)
        check_fits(self.spec, num_pages, num_window_pages, place)
        loaded = load_checkpoint(checkpoint, place, dtype)
        self.cache = CompressedKVCache(
            self.spec, num_pages=num_pages, num_window_pages=num_window_pages, max_requests=max_requests, device=place
        )
        self.text = Text(loaded.tokenizer, int(loaded.model.config.vocab_size), loaded.name)
        self.engine = Engine(
            CachedModel(loaded.model, self.cache),
            self.text,
            loaded.eos_ids,
            max_ends=max_ends,
            chunk_tokens=chunk_tokens,
            debug=debug,
        )
        self._name = loaded.name
        self._dtype = str(loaded.model.dtype).removeprefix("torch.")
        self._weights = fingerprint(loaded.model)

    @locked
    def open(self, text_or_ids: str | Sequence[int], *, stream: bool | Sink = False) -> Handle:
        """Start a sequence with a prompt.

        Args:
            text_or_ids (str | Sequence[int]): a text, or token ids.
            stream (bool | Sink): what `Handle.generate` does with text as it comes: True prints it, a function gets it.

        Raises:
            OutOfPagesError: it can never fit beside what is held, and nothing was changed; or every state slot is taken.
            UnsupportedError: a text, and the checkpoint has no tokenizer.
            ValueError: no token, or an id out of range.
            TypeError: neither a text nor integers.
        """
        return Handle(self.engine, self.engine.open(self.text.encode(text_or_ids)), stream)

    @locked
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
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
            prompts (Prompt | Sequence[Prompt]): texts and token ids, whose sequences end with the call; and handles, which grow.
                A text or a handle by itself is one prompt.
            max_new_tokens (int): for each, at most.
            temperature (float): as in `Handle.generate`.
            seed (int | None): of the first prompt's draws; the next one's is one more.
            stop (Stop | None): as in `Handle.generate`.
            sink (Sink | None): gets every prompt's text as it comes.
            progress (bool): show a progress bar.

        Returns:
            list[Completion]: one for each prompt.

        Raises:
            OutOfPagesError: a prompt can never fit, or the handles do not fit together, and nothing was changed; or a sequence
                outgrew the cache though it was alone.
            UnknownRequestError: a handle is closed.
            ValueError, TypeError: an argument out of range, or of another type.
        """
        count = whole_number("max_new_tokens", max_new_tokens, least=0)
        given = [prompts] if isinstance(prompts, (str, Handle)) else prompts
        if not isinstance(given, Iterable):
            raise TypeError(f"prompts: expected a text, a handle or a list of prompts, got {type(given).__name__}")
        found = [_live(prompt) if isinstance(prompt, Handle) else self.text.encode(prompt) for prompt in given]
        return self.engine.generate(found, count, temperature=temperature, seed=seed, stop=stop, sink=sink, progress=progress)

    @locked
    def save(self, handle: Handle, path: str | Path) -> None:
        """Write a sequence to disk; another process with the same weights can go on from there.

        Raises:
            SavedFileError: it cannot be written; nothing was left behind.
            UnknownRequestError: closed.
        """
        sequence = handle.live()
        self.cache.save(request_of(sequence), Path(path), extra=pack_sequence(sequence, self._weights))

    @locked
    def load(self, path: str | Path, *, other_weights: bool = False) -> Handle:
        """Read a sequence that `save` wrote.

        Args:
            path (str | Path): the file.
            other_weights (bool): take one that other weights computed, or the same in another dtype. What it holds is not what
                this model would have computed, so no prompt continues from it; only its own forks do.

        Raises:
            OutOfPagesError: no room; no sequence was changed.
            SavedFileError: missing, damaged, of another spec, or of other weights; no sequence was changed.
        """
        request = self._load(Path(path))
        try:
            sequence = unpack_sequence(request.extra, request.seq_len, self.text.vocab_size, self.cache.device)
        except ValueError as error:
            self.cache.close(request)
            raise SavedFileError(f"{path}: expected a sequence that Runtime.save wrote, got {error}") from error
        found = request.extra.get(WEIGHTS, "")
        sequence.is_foreign = found != self._weights
        if sequence.is_foreign and not other_weights:
            self.cache.close(request)
            raise SavedFileError(
                f"{path}: expected a sequence of the weights {self._weights}, which {self._name} has in {self._dtype}, got one of "
                f"{found or 'mixed ones'}; load(..., other_weights=True) takes it nevertheless"
            )
        sequence.request = request
        sequence.cached_tokens = request.seq_len
        return Handle(self.engine, self.engine.adopt(sequence))

    @staticmethod
    def prune(folder: str | Path, *, dry_run: bool = False) -> Pruned:
        """Remove pages of saved sequences that no manifest names any more; see `sglang_dsv4.cache.prune_saved`.

        Deleting a saved sequence is deleting its manifest, and this.
        """
        return prune_saved(folder, dry_run=dry_run)

    @locked
    def restore(self, snapshot: HandleSnapshot) -> Handle:
        """Start a sequence that continues from a snapshot; the snapshot stays.

        Raises:
            OutOfPagesError: every state slot is taken; nothing was changed.
            UnknownRequestError: the snapshot was released.
        """
        return Handle(self.engine, self.engine.restore(*snapshot.sequence()))

    @locked
    def report(self) -> RuntimeReport:
        """Where the bytes are, who holds them, and how often prefixes were found."""
        return make_report(self._name, self.cache, self.engine.index, self.engine.live, self.text)

    def __repr__(self) -> str:
        free = self.cache.requests.num_free(Owner.HISTORY_PAGE)
        return (
            f"Runtime({self._name!r}, {self._dtype} on {self.cache.device}: {len(self.cache.requests.opened)} sequences open, "
            f"{free} history pages free)"
        )

    def _repr_html_(self) -> str:
        return f"<code>{escape(repr(self))}</code>"

    def _load(self, path: Path) -> Request:
        while True:
            try:
                return self.cache.load(path)
            except OutOfPagesError as error:
                # The index holds pages, but no state slot.
                if error.pool == "state slots" or not self.engine.index.evict():
                    raise


def _live(handle: Handle) -> LiveSequence:
    sequence = handle.live()
    if not sequence.tokens:
        raise ValueError(f"{handle}: expected at least one token, got none")
    return sequence


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
