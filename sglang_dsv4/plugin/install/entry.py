"""What SGLang calls when it loads its plug-ins, in the launcher and in each scheduler process.

SGLang logs an exception of a plug-in and goes on without it. With the compressed cache asked for, that would serve
another cache under our name; so every failure becomes `SystemExit` then, which SGLang does not swallow. For the same
reason nothing but the standard library is imported at the top: SGLang would log what is missing, and go on.

Not asked for, a failure here is SGLang's to log. The flags are added last, so that after one they are unknown, and
SGLang refuses them.
"""

import logging
from contextlib import AbstractContextManager
from types import TracebackType

logger = logging.getLogger(__name__)

# Our own failures and unusable values: the sentence says all, a traceback would bury it.
_PLAIN = ("sglang_dsv4.errors", "builtins.ValueError")


class Refuse(AbstractContextManager[None]):
    """Turns a failure inside into one sentence and a non-zero exit.

    Args:
        kind (type[Exception]): failures to turn; what is not of our own making keeps its traceback as well.
    """

    def __init__(self, kind: type[Exception] = Exception) -> None:
        self._kind = kind

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, self._kind):
            return
        names = [f"{base.__module__}.{base.__qualname__}" for base in type(error).__mro__]
        if not any(name.startswith(_PLAIN) for name in names):
            logger.error("sglang_dsv4: unexpected failure", exc_info=error)
        raise SystemExit(f"sglang_dsv4: {error}") from error


def register() -> None:
    """Add our flags, and take over where ``SGLANG_DSV4_COMPRESSED_KV=1`` asks for it."""
    with Refuse():  # an unusable value is neither on nor off
        from sglang_dsv4 import env

        is_enabled = env.is_enabled(env.COMPRESSED_KV)
    with Refuse(Exception if is_enabled else _Never):
        from sglang_dsv4.plugin.install import launch

        launch.register()
        if is_enabled:
            launch.activate()


class _Never(Exception):
    """Raised nowhere."""
