"""Stand-in for SGLang's compiled kernels on a machine that has none of them.

With ``SGLANG_USE_CPU_ENGINE=1`` SGLang imports a few ``*_cpu`` kernels by name at start-up and calls them only for
features that a CPU server with this plug-in does not use. Those names exist here and refuse to be called. Every other
name is absent, which is what SGLang's own fall-backs test for.
"""

from collections.abc import Callable
from typing import NoReturn

__version__ = "0.0.0+standin"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("_") or not name.endswith("_cpu"):
        raise AttributeError(f"sgl_kernel.{name}: this sgl_kernel is a stand-in without any kernel")

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: this sgl_kernel is a stand-in; its kernels cannot be called")

    refuse.__name__ = refuse.__qualname__ = name
    return refuse
