"""How the stand-in refuses."""

from collections.abc import Callable
from typing import NoReturn

_REASON = "this torchvision is a stand-in without any image code; install the real one to process images"


def absent(path: str) -> Callable[..., NoReturn]:
    """A function to import but not to call: it raises NotImplementedError with ``path``."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"{path}: {_REASON}")

    refuse.__name__ = refuse.__qualname__ = path.rpartition(".")[2]
    return refuse


def absent_attributes(module: str) -> Callable[[str], NoReturn]:
    """A module-level ``__getattr__`` that says why the name is not there."""

    def refuse(name: str) -> NoReturn:
        raise AttributeError(f"{module}.{name}: {_REASON}")

    return refuse
