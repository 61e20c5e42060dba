"""Put portable ops in place of the stock ones, in every module that already holds one.

SGLang's own hook registry is not used here: it applies hooks after the plug-in has returned, logs what fails and goes on,
and wraps the replacement in a function, which a Triton kernel, launched as ``kernel[grid](...)``, is not.
"""

import pkgutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install.portable.capabilities import Capabilities
from sglang_dsv4.plugin.install.portable.table import PortableOp


@dataclass(frozen=True)
class InstalledOp:
    """A portable op that is in place.

    Attributes:
        op (PortableOp): which one.
        stock (Any): what it replaced.
        rebound (tuple[str, ...]): names in other modules that held the stock one when it was installed.
    """

    op: PortableOp
    stock: Any
    rebound: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the op, as in logs."""
        return self.op.name


_installed: dict[str, InstalledOp] = {}


def choose(capabilities: Capabilities, ops: Iterable[PortableOp]) -> list[PortableOp]:
    """The ops whose stock implementation cannot run here.

    Args:
        capabilities (Capabilities): what can.
        ops (Iterable[PortableOp]): to choose from.
    """
    return [op for op in ops if not capabilities.offers(op.needs)]


def install(capabilities: Capabilities, ops: Iterable[PortableOp]) -> list[InstalledOp]:
    """Replace what cannot run here, and check that it is replaced. May be called again; then nothing changes.

    Modules that are imported later take the replacement, because it stands at the definition.

    Args:
        capabilities (Capabilities): what can run.
        ops (Iterable[PortableOp]): to choose from.

    Returns:
        list[InstalledOp]: what is in place.

    Raises:
        UnsupportedError: SGLang lacks a target, or still holds the stock one somewhere; names them.
    """
    chosen = choose(capabilities, ops)
    # Before anything is changed: any of them may be missing.
    owners = [_owner(op.target) for op in chosen]
    stock = [getattr(*owner) for owner in owners]
    bindings = _bindings(stock)
    done = [_install(op, owner, bindings[id(replaced)]) for op, owner, replaced in zip(chosen, owners, stock, strict=True)]
    check_installed(done, loaded_only=True)
    return done


def check_installed(installed: Iterable[InstalledOp], *, loaded_only: bool = False) -> None:
    """Check that SGLang's model and scheduler reach the replacements.

    Args:
        installed (Iterable[InstalledOp]): what `install` returned.
        loaded_only (bool): pass over modules that are not imported yet; they will take the replacement.

    Raises:
        UnsupportedError: names each path that leads elsewhere, and where.
    """
    astray = []
    installed = list(installed)
    bindings = _bindings([done.stock for done in installed])
    for done in installed:
        for path in (done.op.target, *done.op.seen_as):
            if loaded_only and path.rpartition(".")[0] not in sys.modules and path != done.op.target:
                continue
            found = getattr(*_owner(path))
            if found is not done.op.replacement:
                astray.append(f"{path} is {found!r}")
        astray += [f"{name} is the stock one" for name, _, _ in bindings[id(done.stock)]]
    if astray:
        raise UnsupportedError(f"portable ops: expected in place, but {'; '.join(astray)}")


def check_all_installed() -> list[str]:
    """`check_installed` of all that is in place; the names of the ops.

    Raises:
        UnsupportedError: as `check_installed` does.
    """
    check_installed(_installed.values())
    return [done.name for done in _installed.values()]


def _install(op: PortableOp, owner: tuple[Any, str], bindings: list[tuple[str, ModuleType, str]]) -> InstalledOp:
    stock = getattr(*owner)
    if stock is op.replacement and op.target in _installed:
        return _installed[op.target]
    _set(*owner, op.replacement)
    for _, module, attribute in bindings:
        setattr(module, attribute, op.replacement)
    # The definition itself is no rebinding.
    rebound = tuple(sorted(name for name, _, _ in bindings if name != op.target))
    _installed[op.target] = InstalledOp(op, stock, rebound)
    return _installed[op.target]


def _set(owner: Any, attribute: str, replacement: Any) -> None:
    # A bare function in the place of a static method would be handed the instance.
    is_static = isinstance(owner, type) and isinstance(vars(owner).get(attribute), staticmethod)
    setattr(owner, attribute, staticmethod(replacement) if is_static else replacement)


def _owner(path: str) -> tuple[Any, str]:
    """The module or class that holds a name, and the name."""
    parent, _, attribute = path.rpartition(".")
    try:
        owner = pkgutil.resolve_name(parent)
        getattr(owner, attribute)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(f"{path}: expected in SGLang, but missing ({error})") from error
    return owner, attribute


def _bindings(values: Iterable[Any]) -> dict[int, list[tuple[str, ModuleType, str]]]:
    """Global names of SGLang's loaded modules that are bound to exactly these objects, by the object's `id`."""
    found: dict[int, list[tuple[str, ModuleType, str]]] = {id(value): [] for value in values}
    for module_name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or module_name.partition(".")[0] != "sglang":
            continue
        for attribute, bound in list(vars(module).items()):
            if id(bound) in found:
                found[id(bound)].append((f"{module_name}.{attribute}", module, attribute))
    return found
