"""Text to tokens and back."""

from collections.abc import Iterable, Mapping, Sequence, Set
from operator import index
from typing import Any

from sglang_dsv4.errors import UnsupportedError

_INCOMPLETE = "\ufffd"


class Text:
    """A checkpoint's tokenizer, or the lack of one.

    Args:
        tokenizer (Any): transformers' tokenizer, or None.
        vocab_size (int): token ids are below it.
        name (str): the checkpoint, for messages.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, name: str) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._name = name

    def encode(self, given: str | Sequence[int]) -> list[int]:
        """Token ids of a text; ids are checked and given back.

        Raises:
            UnsupportedError: a text, and no tokenizer.
            ValueError: no token, or an id out of range.
            TypeError: neither a text nor integers.
        """
        if isinstance(given, str):
            if self._tokenizer is None:
                raise UnsupportedError(
                    f"{self._name}: expected token ids, got a text, and the checkpoint has no tokenizer.json"
                )
            tokens = list(self._tokenizer(given)["input_ids"])
        else:
            tokens = [token_id(token) for token in _ids(given)]
        if not tokens:
            raise ValueError("prompt: expected at least one token, got none")
        wrong = [token for token in tokens if not 0 <= token < self.vocab_size]
        if wrong:
            raise ValueError(f"prompt: expected ids of 0 .. {self.vocab_size - 1}, got {wrong[0]}")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; their ids where there is no tokenizer."""
        if self._tokenizer is None:
            return "".join(f" {token}" for token in tokens)
        return self._tokenizer.decode(list(tokens))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token's own text."""
        return [self.decode([token]) for token in tokens]


def _ids(given: Any) -> Iterable[Any]:
    if isinstance(given, (bytes, bytearray, Mapping, Set)) or not isinstance(given, Iterable):
        raise TypeError(f"prompt: expected a text or token ids, got {type(given).__name__}")
    return given


def token_id(value: Any) -> int:
    """An integer of any type, numpy's and torch's among them; neither a float nor a bool.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        try:
            return index(value)
        except TypeError:
            pass
    raise TypeError(f"token ids: expected integers, got {value!r}")


class TextStream:
    """The text of tokens that come one at a time, in pieces of whole characters."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._tokens: list[int] = []
        self._begin = 0  # tokens before it are not decoded again
        self._given = 0  # tokens before it are in the pieces given so far

    def take(self, token: int) -> str:
        """The new text; empty while a character is incomplete."""
        self._tokens.append(token)
        piece = self._new()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._begin, self._given = self._given, len(self._tokens)
        return piece

    def rest(self) -> str:
        """What was held back."""
        piece = self._new()
        self._begin = self._given = len(self._tokens)
        return piece

    def _new(self) -> str:
        # A token may look different behind another one, so the last piece's tokens are decoded with it.
        before = self._text.decode(self._tokens[self._begin : self._given])
        return self._text.decode(self._tokens[self._begin :])[len(before) :]
