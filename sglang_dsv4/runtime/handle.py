"""One sequence in a user's hands."""

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang_dsv4.cache import Snapshot
from sglang_dsv4.errors import TruncateError, UnknownRequestError
from sglang_dsv4.runtime.output import Completion, Stop
from sglang_dsv4.runtime.sequence import LiveSequence
from sglang_dsv4.runtime.show.picture import Picture

if TYPE_CHECKING:
    from sglang_dsv4.runtime.runtime import Runtime

Sink = Callable[[str], Any]


class HandleSnapshot:
    """One moment of a sequence; made by `Handle.snapshot`, for `Runtime.restore`.

    It holds pages until `release`, or until nobody refers to it any more.

    Attributes:
        tokens (tuple[int, ...]): the tokens of that moment.
    """

    def __init__(self, runtime: "Runtime", kept: Snapshot, sequence: LiveSequence) -> None:
        self.tokens = tuple(sequence.tokens)
        self._runtime = runtime
        self._kept = kept
        self._logits = sequence.logits
        self._release = weakref.finalize(self, runtime.orphans.append, kept)
        self._release.atexit = False

    @property
    def seq_len(self) -> int:
        """Tokens."""
        return len(self.tokens)

    def release(self) -> None:
        """Give the pages back; releasing twice does nothing."""
        self._release()
        self._runtime.collect()

    def sequence(self) -> tuple[Snapshot, LiveSequence]:
        """What to continue from.

        Raises:
            UnknownRequestError: the snapshot was released.
        """
        if not self._release.alive:
            raise UnknownRequestError(f"{self}: expected a snapshot that is held, got a released one")
        return self._kept, LiveSequence(list(self.tokens), logits=self._logits)

    def __repr__(self) -> str:
        return f"HandleSnapshot(seq_len={self.seq_len})"


class Handle:
    """One sequence: made by `Runtime.open`, `restore` and `load`, and by `fork`.

    It holds pages and a state slot until `close`, or until nobody refers to it any more.

    Args:
        runtime (Runtime): whose cache holds the sequence.
        sequence (LiveSequence): the tokens and their request.
        stream (bool | Sink): where generated text goes as it comes, unless `generate` is told otherwise.
    """

    def __init__(self, runtime: "Runtime", sequence: LiveSequence, stream: bool | Sink = False) -> None:
        self._runtime = runtime
        self._sequence = sequence
        self._stream = stream
        self._close = weakref.finalize(self, runtime.orphans.append, sequence)
        self._close.atexit = False

    @property
    def seq_len(self) -> int:
        """Tokens, prompt and generated."""
        return len(self._sequence.tokens)

    @property
    def tokens(self) -> list[int]:
        """Their ids, a copy."""
        return list(self._sequence.tokens)

    @property
    def text(self) -> str:
        """Their text."""
        return self._runtime.text.decode(self._sequence.tokens)

    @property
    def min_len(self) -> int:
        """The shortest length that `truncate` can go to."""
        request = self.live().request
        assert request is not None, "a live handle has a request"
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

    def fork(self) -> "Handle":
        """A second handle that continues from the same tokens; pages are shared until one of the two writes.

        Raises:
            OutOfPagesError: every state slot is taken; nothing was changed.
            UnknownRequestError: closed.
        """
        runtime, sequence = self._runtime, self.live()
        runtime.collect()
        assert sequence.request is not None, "a live handle has a request"
        request = runtime.cache.fork(sequence.request)
        twin = LiveSequence(list(sequence.tokens), request, sequence.logits, cached_tokens=sequence.num_fed)
        return runtime.adopt(twin, self._stream)

    def append(self, text_or_ids: str | Sequence[int]) -> "Handle":
        """Continue the sequence with given tokens, such as the next turn of a conversation.

        Raises:
            OutOfPagesError: they do not fit; nothing was changed.
            UnknownRequestError: closed.

        Returns:
            Handle: this one.
        """
        self._runtime.extend(self.live(), self._runtime.text.encode(text_or_ids))
        return self

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
            ValueError: an argument out of range.
        """
        wanted = self._stream if stream is None else stream
        sink = _print if wanted is True else wanted or None
        return self._runtime.generate([self], n, temperature=temperature, seed=seed, stop=stop, sink=sink, progress=False)[0]

    def truncate(self, n: int) -> "Handle":
        """Roll the sequence back to its first ``n`` tokens; moves nothing.

        Raises:
            TruncateError: ``n`` is not in ``min_len .. seq_len``.
            UnknownRequestError: closed.

        Returns:
            Handle: this one.
        """
        sequence = self.live()
        if not self.min_len <= n <= self.seq_len:
            raise TruncateError(
                f"{self}: expected a length of {self.min_len} .. {self.seq_len}, got {n}; "
                "open(handle.tokens[:n]) computes any other"
            )
        self._runtime.truncate(sequence, n)
        return self

    def snapshot(self) -> HandleSnapshot:
        """Hold on to the sequence as it is now.

        Raises:
            UnknownRequestError: closed.
        """
        sequence = self.live()
        self._runtime.collect()
        assert sequence.request is not None, "a live handle has a request"
        kept = self._runtime.cache.snapshot(sequence.request)
        return HandleSnapshot(self._runtime, kept, sequence)

    def show(self) -> Picture:
        """The picture: tokens, blocks, entries, pages, tail, streams and window.

        Raises:
            UnknownRequestError: closed.
        """
        return self._runtime.picture(self.live())

    def close(self) -> None:
        """Give pages and state slot back; closing twice does nothing."""
        self._close()
        self._runtime.collect()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Handle(seq_len={self.seq_len})"


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
