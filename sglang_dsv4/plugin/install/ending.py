"""Ends a process with one sentence. Standard library only: it must work where anything else of ours is missing."""

import logging
from contextlib import AbstractContextManager
from types import TracebackType

logger = logging.getLogger(__name__)

# Our own failures and unusable values: the sentence says all, a traceback would bury it.
_PLAIN = ("sglang_dsv4.errors", "builtins.ValueError")


class Refuse(AbstractContextManager[None]):
    """Turns a failure inside into one sentence and a non-zero exit.

    Args:
        kinds (type[Exception]): failures to turn, none for none; what is not of our own making keeps its traceback as well.
    """

    def __init__(self, *kinds: type[Exception]) -> None:
        self._kinds = kinds

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, self._kinds):
            return
        names = [f"{base.__module__}.{base.__qualname__}" for base in type(error).__mro__]
        if not any(name.startswith(_PLAIN) for name in names):
            logger.error("sglang_dsv4: unexpected failure", exc_info=error)
        raise SystemExit(f"sglang_dsv4: {error}") from error
