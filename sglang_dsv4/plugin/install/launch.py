"""Our flags, and the hooks on SGLang's arguments that read and check them."""

import argparse
import inspect
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sglang_dsv4.errors import CacheError, UnsupportedError
from sglang_dsv4.plugin.install import contract, options
from sglang_dsv4.plugin.install.entry import Refuse

logger = logging.getLogger(__name__)

# Dotted path of a target, our function, and how SGLang combines the two (its HookType).
Hook = tuple[str, Callable[..., Any], Any]

_hooks: list[Hook] = []
_activated = False


def register() -> None:
    """Register the hooks; SGLang applies them once every plug-in is loaded. The one that adds the flags comes last."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _hooks[:] = [
        (contract.POST_INIT, _post_init, HookType.AROUND),
        (contract.FROM_CLI_ARGS, _from_cli_args, HookType.AROUND),
        (contract.ADD_CLI_ARGS, _add_cli_args, HookType.AFTER),
    ]
    if contract.SERVE_KIND.rpartition(".")[0] in sys.modules:  # `sglang serve` is running
        _hooks.insert(0, (contract.SERVE_KIND, _serve_kind, HookType.AFTER))
    for hook in _hooks:
        HookRegistry.register(*hook)


def activate(device: str | None = None) -> None:
    """Take over this process; the second time nothing changes.

    Args:
        device (str | None): as in `activation.activate`.

    Raises:
        UnsupportedError: the version or a name of SGLang is not the expected one, or a hook is not in place.
    """
    global _activated
    if _activated:
        return
    contract.check_version(contract.installed_version())
    from sglang_dsv4.plugin.install import activation

    activation.activate(device)
    check_hooks(_hooks)
    _activated = True


def check_hooks(hooks: Iterable[Hook]) -> None:
    """Check that calling each target leads to our function. SGLang only logs a hook that it cannot apply.

    Args:
        hooks (Iterable[Hook]): what was registered.

    Raises:
        UnsupportedError: names the targets that are not hooked.
    """
    missing = [target for target, hook, _ in hooks if not any(found is hook for found in _functions_behind(target))]
    if missing:
        raise UnsupportedError(f"hooks: expected in place, but SGLang did not apply {', '.join(missing)}")


def _functions_behind(target: str) -> Iterator[Any]:
    """What SGLang's wrappers around a target call: each holds its hook, and names the function it wraps."""
    try:
        function = pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return
    while function is not None:
        function = getattr(function, "__func__", function)
        if inspect.isfunction(function):
            yield from inspect.getclosurevars(function).nonlocals.values()
        function = getattr(function, "__wrapped__", None)


def _add_cli_args(result: Any, parser: argparse.ArgumentParser) -> Any:
    # A flag that nothing reads would be ignored; one that is not added is refused by the parser.
    try:
        check_hooks(_hooks)
    except UnsupportedError as error:
        logger.error("sglang_dsv4: --enable-dsv4-compressed-kv is not available: %s", error)
        return result
    options.add_arguments(parser)
    return result


def _from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    with Refuse():
        options.publish(args)
        is_enabled = options.is_enabled()
        if is_enabled:
            from sglang_dsv4.plugin.install import activation, refusals

            activate(args.device)
            refusals.check_port(args.host, args.port)
            activation.prepare(args)
    if not is_enabled:
        return original(cls, args)  # what SGLang raises is its own
    with Refuse(CacheError):
        return original(cls, args)


def _post_init(original: Callable[..., Any], server_args: Any) -> None:
    if not options.is_enabled():
        original(server_args)
        return
    from sglang_dsv4.plugin.install import activation

    activate(server_args.device)  # the variable may have been set after the plug-in was loaded
    activation.prepare(server_args)
    original(server_args)
    activation.check_resolved(server_args)


def _serve_kind(result: tuple[str, list[str]], argv: list[str]) -> tuple[str, list[str]]:
    """Keep ``sglang serve`` from its diffusion server, which would pass over our flags in silence."""
    kind, rest = result
    if not options.is_enabled() and not any(flag.startswith(options.ENABLE_FLAG) for flag in argv):
        return result
    if kind == "diffusion":
        raise SystemExit(f"sglang_dsv4: --model-type {kind}: not supported with {options.ENABLE_FLAG}")
    return "llm", rest
