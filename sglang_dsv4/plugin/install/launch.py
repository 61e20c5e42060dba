"""Our flags, and the hooks on SGLang's arguments that read and check them."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

from sglang_dsv4.errors import CacheError, UnsupportedError
from sglang_dsv4.plugin.install import contract, hooks, options, versions
from sglang_dsv4.plugin.install.ending import Refuse
from sglang_dsv4.plugin.install.hooks import Hook

logger = logging.getLogger(__name__)


class _State:
    """Of this process: the hooks on SGLang's arguments, whether the cache has taken over, and who will read a refusal."""

    hooks: tuple[Hook, ...] = ()
    is_active = False
    is_command = False  # a command line, which wants a sentence; otherwise a program, which wants an exception


def register() -> None:
    """Register the hooks; SGLang applies them once every plug-in is loaded. The one that adds the flags comes last.

    Raises:
        UnsupportedError: this SGLang is none of those that are served.
    """
    version = versions.installed()
    serving = tuple(hook for hook in version.serve_hooks if "sglang.cli.serve" in sys.modules)  # `sglang serve` is running
    _State.hooks = (
        *serving,
        Hook(version.resolve, _resolve, "AROUND", at_start=True),
        Hook(contract.FROM_CLI_ARGS, _from_cli_args, "AROUND"),
        Hook(contract.ADD_CLI_ARGS, _add_cli_args, "AFTER"),
    )
    hooks.register(_State.hooks)


def activate(device: str | None = None) -> None:
    """Take over this process; the second time nothing changes.

    Args:
        device (str | None): as in `activation.activate`.

    Raises:
        UnsupportedError: the version or a name of SGLang is not the expected one, or a hook is not in place.
    """
    if _State.is_active:
        return
    version = versions.check_installed()
    from sglang_dsv4.plugin.install import activation

    activation.activate(device, version, _State.hooks)
    hooks.check_in_place(_State.hooks)
    _State.is_active = True


def _add_cli_args(result: Any, parser: argparse.ArgumentParser) -> Any:
    # A flag that nothing reads would be ignored; one that is not added is refused by the parser.
    try:
        hooks.check_in_place(_State.hooks)
    except UnsupportedError as error:
        logger.error("sglang_dsv4: --enable-dsv4-compressed-kv is not available: %s", error)
        return result
    options.add_arguments(parser)
    return result


def _from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    with Refuse(Exception):
        options.publish(args)
        is_enabled = options.is_enabled()
        if is_enabled:
            from sglang_dsv4.plugin.install import arguments, machine

            _State.is_command = True
            activate(args.device)
            machine.check_port(args.host, args.port)
            arguments.prepare(args)
    if not is_enabled:
        return original(cls, args)  # what SGLang raises is its own
    with Refuse(CacheError):
        return original(cls, args)


def _resolve(original: Callable[..., Any], server_args: Any) -> None:
    if not options.is_enabled() or versions.installed().is_resolved(server_args):
        original(server_args)
        return
    from sglang_dsv4.plugin.install import arguments

    with Refuse(*([CacheError] if _State.is_command else [])):
        activate(server_args.device)  # the variable may have been set after the plug-in was loaded
        arguments.prepare(server_args)
        original(server_args)
        arguments.check_resolved(server_args)
