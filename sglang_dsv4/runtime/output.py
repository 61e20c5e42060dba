"""What a generation gives, and when it ends."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from sglang_dsv4.runtime.text import Text, TextStream

Stop = str | int | Sequence[str | int]


@dataclass(frozen=True, repr=False)
class Completion:
    """The end of a generation.

    Attributes:
        text (str): the new text, up to where it stopped; a stop string or an end token is not in it.
        tokens (tuple[int, ...]): the new tokens, all of them.
        finish (str): ``"length"`` or ``"stop"``.
        cached_tokens (int): tokens that another sequence had computed before.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    cached_tokens: int = 0

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Completion({self.text!r}, {len(self.tokens)} tokens, {self.finish})"


class StopRule:
    """Which tokens and strings end a generation.

    Args:
        stop (Stop | None): strings and token ids; None means the checkpoint's end tokens, and ``()`` nothing.
        eos_ids (Collection[int]): the checkpoint's end tokens.
    """

    def __init__(self, stop: Stop | None, eos_ids: Collection[int]) -> None:
        given: Sequence[str | int] = [stop] if isinstance(stop, (str, int)) else list(stop or ())
        for item in given:
            if not isinstance(item, (str, int)) or isinstance(item, bool) or item == "":
                raise ValueError(f"stop: expected texts and token ids, got {item!r}")
        self.token_ids = frozenset(item for item in given if isinstance(item, int))
        if stop is None:
            self.token_ids = frozenset(eos_ids)
        self.strings = tuple(item for item in given if isinstance(item, str))


class Output:
    """The tokens of one generation as they come.

    Args:
        text (Text): the tokenizer.
        rule (StopRule): when to end.
        max_new_tokens (int): when to end at the latest.
        sink (Callable[[str], None] | None): gets the text piece by piece.
    """

    def __init__(self, text: Text, rule: StopRule, max_new_tokens: int, sink: Callable[[str], None] | None = None) -> None:
        self.tokens: list[int] = []
        self.stopped = False
        self._max_new_tokens = max_new_tokens
        self._rule = rule
        self._sink = sink
        self._stream = TextStream(text)
        self._text = ""

    @property
    def is_done(self) -> bool:
        """Whether no token may follow."""
        return self.room == 0

    @property
    def room(self) -> int:
        """Tokens that may follow."""
        return 0 if self.stopped else max(0, self._max_new_tokens - len(self.tokens))

    def take(self, token: int) -> None:
        """Note the next token."""
        self.tokens.append(token)
        if token in self._rule.token_ids:
            self.stopped = True
        else:
            self._add(self._stream.take(token))
        if self.is_done:
            self._add(self._stream.rest())

    def completion(self, cached_tokens: int = 0) -> Completion:
        """The result."""
        finish = "stop" if self.stopped else "length"
        return Completion(self._text, tuple(self.tokens), finish, cached_tokens)

    def _add(self, piece: str) -> None:
        shown = len(self._text)
        self._text += piece
        ends = [self._text.find(string) for string in self._rule.strings]
        found = [end for end in ends if end >= 0]
        if found:
            self.stopped = True
            self._text = self._text[: min(found)]
        if self._sink is not None and len(self._text) > shown:
            self._sink(self._text[shown:])
