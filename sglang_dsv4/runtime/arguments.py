"""Arguments are checked where a user passes them, not in some line behind."""

from operator import index
from typing import Any


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """An integer of any type, numpy's and torch's among them; neither a float nor a bool.

    Raises:
        TypeError: anything else.
        ValueError: it is less than ``least``.
    """
    try:
        found = None if isinstance(value, bool) else index(value)
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if least is not None and found < least:
        raise ValueError(f"{name}: expected {least} or more, got {found}")
    return found


def number(name: str, value: Any) -> float:
    """A real number of any type but bool.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)
