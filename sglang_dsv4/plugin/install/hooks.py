"""Our hooks on SGLang's functions: registered, found in place, and called.

SGLang only logs a hook that it cannot apply, and a function that is hooked may have lost its callers in another version. So
each hook is looked for after it was applied, and before a scheduler takes requests each must have been called.
"""

import functools
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError


@dataclass(frozen=True)
class Hook:
    """One function of ours on one of SGLang's.

    Attributes:
        target (str): dotted path of SGLang's.
        function (Callable[..., Any]): ours.
        kind (str): how SGLang combines the two: ``BEFORE``, ``AFTER`` or ``AROUND``.
        at_start (bool): whether SGLang must call it before a scheduler is ready.
    """

    target: str
    function: Callable[..., Any]
    kind: str
    at_start: bool = False


_placed: dict[Hook, Callable[..., Any]] = {}


def register(hooks: Iterable[Hook]) -> None:
    """Hand hooks to SGLang's registry, which applies them when every plug-in is loaded, or at `apply`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        _placed[hook] = remembering(hook)
        HookRegistry.register(hook.target, _placed[hook], HookType[hook.kind])


def apply(hooks: Iterable[Hook]) -> None:
    """Register hooks, have SGLang apply them now, and check that it did.

    Raises:
        UnsupportedError: names the targets that are not hooked.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks = tuple(hooks)
    register(hooks)
    HookRegistry.apply_hooks()
    check_in_place(hooks)


def remembering(hook: Hook) -> Callable[..., Any]:
    """The hook's function; one that a start needs notes that it was called."""
    if not hook.at_start:
        return hook.function

    @functools.wraps(hook.function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if env.is_enabled(env.COMPRESSED_KV) and hook.target not in _called():
            # Also for the schedulers, which are started later: arguments are resolved in the launcher alone.
            env.set_value(env.HOOKS_CALLED, ",".join((*_called(), hook.target)))
        return hook.function(*args, **kwargs)

    return call


def _called() -> list[str]:
    return (env.get(env.HOOKS_CALLED) or "").split(",")


def check_in_place(hooks: Iterable[Hook]) -> None:
    """Check that calling each target leads to our function.

    Args:
        hooks (Iterable[Hook]): what was registered.

    Raises:
        UnsupportedError: names the targets that are not hooked.
    """
    missing = [
        hook.target
        for hook in hooks
        if hook not in _placed or not any(found is _placed[hook] for found in _functions_behind(hook.target))
    ]
    if missing:
        raise UnsupportedError(f"hooks: expected in place, but SGLang did not apply {', '.join(missing)}")


def check_called(hooks: Iterable[Hook]) -> None:
    """Check that SGLang has called, in this process or in the one that started it, every hook that a start needs.

    Args:
        hooks (Iterable[Hook]): what was registered.

    Raises:
        UnsupportedError: names the targets that SGLang passed by.
    """
    called = _called()
    missing = [hook.target for hook in hooks if hook.at_start and hook.target not in called]
    if missing:
        raise UnsupportedError(
            f"hooks: expected to be called while the server starts, but SGLang passed by {', '.join(missing)}"
        )


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
