"""One sequence in a user's hands."""

import sys
import weakref
from collections.abc import Sequence
from html import escape

from sglang_dsv4.cache import Snapshot
from sglang_dsv4.errors import TruncateError, UnknownRequestError
from sglang_dsv4.runtime.arguments import whole_number
from sglang_dsv4.runtime.engine import Engine, Sink, locked, request_of
from sglang_dsv4.runtime.output import Completion, Stop
from sglang_dsv4.runtime.sequence import LiveSequence
from sglang_dsv4.runtime.show.picture import Picture, draw_sequence

_LAST_CHARACTERS = 40


class HandleSnapshot:
    """One moment of a sequence; made by `Handle.snapshot`, for `Runtime.restore`.

    It holds pages until `release`, or until nobody refers to it any more.

    Attributes:
        tokens (tuple[int, ...]): the tokens of that moment.
    """

    def __init__(self, engine: Engine, kept: Snapshot, sequence: LiveSequence) -> None:
        self.tokens = tuple(sequence.tokens)
        self.engine = engine
        self._kept = kept
        self._logits = sequence.logits
        self._is_foreign = sequence.is_foreign
        self._release = weakref.finalize(self, engine.orphans.append, kept)
        self._release.atexit = False

    @property
    def seq_len(self) -> int:
        """Tokens."""
        return len(self.tokens)

    def release(self) -> None:
        """Give the pages back; releasing twice does nothing."""
        self._release()
        with self.engine.lock:
            self.engine.collect()

    def sequence(self) -> tuple[Snapshot, LiveSequence]:
        """What to continue from.

        Raises:
            UnknownRequestError: the snapshot was released.
        """
        if not self._release.alive:
            raise UnknownRequestError(f"{self}: expected a snapshot that is held, got a released one")
        return self._kept, LiveSequence(list(self.tokens), logits=self._logits, is_foreign=self._is_foreign)

    def __repr__(self) -> str:
        return f"HandleSnapshot(seq_len={self.seq_len})"


class Handle:
    """One sequence: made by `Runtime.open`, `restore` and `load`, and by `fork`.

    It holds pages and a state slot until `close`, or until nobody refers to it any more. Of all handles of a runtime one method
    runs at a time; a call from another thread waits.

    Args:
        engine (Engine): holds the sequence.
        sequence (LiveSequence): the tokens and their request.
        stream (bool | Sink): where generated text goes as it comes, unless `generate` is told otherwise.
    """

    def __init__(self, engine: Engine, sequence: LiveSequence, stream: bool | Sink = False) -> None:
        self.engine = engine
        self._sequence = sequence
        self._stream = stream
        self._close = weakref.finalize(self, engine.orphans.append, sequence)
        self._close.atexit = False

    @property
    def seq_len(self) -> int:
        """Tokens, prompt and generated."""
        return len(self._sequence.tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Their ids."""
        return tuple(self._sequence.tokens)

    @property
    def text(self) -> str:
        """Their text."""
        return self.engine.text.decode(self._sequence.tokens)

    @property
    def min_len(self) -> int:
        """The shortest length that `truncate` can go to."""
        request = request_of(self.live())
        return request.min_len + 1 if request.min_len else 0

    @property
    def is_closed(self) -> bool:
        """Whether it holds nothing any more."""
        return not self._close.alive

    def live(self) -> LiveSequence:
        """The sequence.

        Raises:
            UnknownRequestError: the handle was closed, or a step of it failed half way.
        """
        if not self._close.alive:
            raise UnknownRequestError(f"{self}: expected an open handle, got a closed one")
        assert self._sequence.request is not None, "only a closed handle has no request"
        return self._sequence

    @locked
    def fork(self) -> "Handle":
        """A second handle that continues from the same tokens; pages are shared until one of the two writes.

        Raises:
            OutOfPagesError: every state slot is taken; nothing was changed.
            UnknownRequestError: closed.
        """
        return Handle(self.engine, self.engine.fork(self.live()), self._stream)

    @locked
    def append(self, text_or_ids: str | Sequence[int]) -> "Handle":
        """Continue the sequence with given tokens, such as the next turn of a conversation.

        Raises:
            OutOfPagesError: they do not fit; nothing was changed.
            UnknownRequestError: closed.

        Returns:
            Handle: this one.
        """
        self.engine.extend(self.live(), self.engine.text.encode(text_or_ids))
        return self

    @locked
    def generate(
        self,
        n: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Stop | None = None,
        stream: bool | Sink | None = None,
    ) -> Completion:
        """Continue the sequence with tokens that the model chooses.

        Args:
            n (int): tokens, at most.
            temperature (float): 0 takes the most likely token each time.
            seed (int | None): of the draws; None takes one from torch's own generator.
            stop (Stop | None): texts and token ids that end the generation; None means the checkpoint's end tokens, and
                ``()`` nothing.
            stream (bool | Sink | None): True prints the text as it comes, a function gets it piece by piece; None does as
                the handle was opened.

        Returns:
            Completion: the new text and tokens. The tokens are part of the sequence, a stop token included.

        Raises:
            OutOfPagesError: ``n`` tokens do not fit; nothing was changed.
            UnknownRequestError: closed.
            ValueError, TypeError: an argument out of range, or of another type.
        """
        wanted = self._stream if stream is None else stream
        sink = _print if wanted is True else wanted or None
        count, sequence = whole_number("n", n, least=0), self.live()
        if not sequence.tokens:
            raise ValueError(f"{self}: expected at least one token, got none")
        return self.engine.generate([sequence], count, temperature=temperature, seed=seed, stop=stop, sink=sink)[0]

    @locked
    def truncate(self, n: int) -> "Handle":
        """Roll the sequence back to its first ``n`` tokens; moves nothing.

        Raises:
            TruncateError: ``n`` is not in ``min_len .. seq_len``.
            UnknownRequestError: closed.

        Returns:
            Handle: this one.
        """
        sequence, n = self.live(), whole_number("n", n)
        if not self.min_len <= n <= self.seq_len:
            raise TruncateError(
                f"{self}: expected a length of {self.min_len} .. {self.seq_len}, got {n}; "
                "open(handle.tokens[:n]) computes any other"
            )
        self.engine.truncate(sequence, n)
        return self

    @locked
    def snapshot(self) -> HandleSnapshot:
        """Hold on to the sequence as it is now.

        Raises:
            UnknownRequestError: closed.
        """
        sequence = self.live()
        return HandleSnapshot(self.engine, self.engine.cache.snapshot(request_of(sequence)), sequence)

    @locked
    def show(self) -> Picture:
        """The picture: tokens, blocks, entries, pages, tail, streams and window.

        Raises:
            UnknownRequestError: closed.
        """
        return draw_sequence(self.engine.cache, self.live(), self.engine.text)

    def close(self) -> None:
        """Give pages and state slot back; closing twice does nothing."""
        self._close()
        with self.engine.lock:
            self.engine.collect()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self.is_closed else ""
        return f"Handle(seq_len={self.seq_len}{state})"

    def _repr_html_(self) -> str:
        last = self.engine.text.decode(self._sequence.tokens[-_LAST_CHARACTERS:])[-_LAST_CHARACTERS:]
        return f"<code>{escape(repr(self))}</code> <em>… {escape(last)}</em>"


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
