"""The only place that reads or sets environment variables."""

import os

COMPRESSED_KV = "SGLANG_DSV4_COMPRESSED_KV"
KV_FORMAT = "SGLANG_DSV4_KV_FORMAT"
INDEX_FORMAT = "SGLANG_DSV4_INDEX_FORMAT"
ATTENTION = "SGLANG_DSV4_ATTENTION"
CHECK = "SGLANG_DSV4_CHECK"
CHECK_DUMPS = "SGLANG_DSV4_CHECK_DUMPS"
DEVICE = "SGLANG_DSV4_DEVICE"
POISON = "SGLANG_DSV4_POISON"
HOOKS_CALLED = "SGLANG_DSV4_HOOKS_CALLED"  # set by the plug-in alone, for the processes that it starts


def get(name: str) -> str | None:
    """Value of a variable, or None where it is unset or empty."""
    return os.environ.get(name) or None


def set_value(name: str, value: str) -> None:
    """Set a variable for this process and those it starts."""
    os.environ[name] = value


def set_default(name: str, value: str) -> str:
    """Set a variable unless the user has set it, and return the value in force."""
    return os.environ.setdefault(name, value)


def is_enabled(name: str) -> bool:
    """Whether a switch is on: ``1``, ``true``, ``yes`` or ``on``; unset, ``0``, ``false``, ``no`` and ``off`` are off.

    Raises:
        ValueError: any other value, so that a misspelt switch is not taken for "off".
    """
    value = (get(name) or "0").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{name}: expected 1 or 0, got {value!r}")


def snapshot() -> dict[str, str]:
    """A copy of the whole environment, for starting another process."""
    return dict(os.environ)
