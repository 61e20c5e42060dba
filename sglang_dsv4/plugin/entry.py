"""What SGLang calls when it loads its plug-ins, in the launcher and in each scheduler process.

SGLang logs an exception of a plug-in and goes on without it. With the compressed cache asked for, that would serve
another cache under our flag; so every failure here becomes `SystemExit`, which SGLang does not swallow. For the same
reason this module imports nothing that may be missing: SGLang would log that, too, and go on.
"""

import argparse
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from sglang_dsv4.errors import CacheError
from sglang_dsv4.plugin import contract, options

logger = logging.getLogger(__name__)

_activated = False


class Refuse(AbstractContextManager[None]):
    """Turns a failure inside into one sentence and a non-zero exit.

    Args:
        kind (type[Exception]): failures to turn; what is not of our own making keeps its traceback as well.
    """

    def __init__(self, kind: type[Exception] = Exception) -> None:
        self._kind = kind

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, self._kind):
            return
        if not isinstance(error, (CacheError, ValueError)):
            logger.error("sglang_dsv4: unexpected failure", exc_info=error)
        raise SystemExit(f"sglang_dsv4: {error}") from error


def register() -> None:
    """Add our flags, and take over where ``SGLANG_DSV4_COMPRESSED_KV=1`` asks for it."""
    with Refuse():
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(contract.ADD_CLI_ARGS, _add_cli_args, HookType.AFTER)
        HookRegistry.register(contract.FROM_CLI_ARGS, _from_cli_args, HookType.AROUND)
        HookRegistry.register(contract.POST_INIT, _post_init, HookType.AROUND)
        if options.is_enabled():
            _activate()


def _add_cli_args(result: Any, parser: argparse.ArgumentParser) -> Any:
    options.add_arguments(parser)
    return result


def _from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    with Refuse():
        options.publish(args)
        if not options.is_enabled():
            return original(cls, args)
        from sglang_dsv4.plugin import activation, refusals

        _activate()
        refusals.check_port(args.host, args.port)
        activation.prepare(args)
    with Refuse(CacheError):
        return original(cls, args)


def _post_init(original: Callable[..., Any], server_args: Any) -> None:
    if options.is_enabled():
        from sglang_dsv4.plugin import activation

        activation.prepare(server_args)
    original(server_args)
    if options.is_enabled():
        from sglang_dsv4.plugin import activation

        activation.check_resolved(server_args)


def _activate() -> None:
    global _activated
    if _activated:
        return
    contract.check_version(contract.installed_version())
    from sglang_dsv4.plugin import activation

    activation.activate()
    _activated = True
