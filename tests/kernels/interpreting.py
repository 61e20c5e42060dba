"""Checks under Triton's CPU interpreter. It is chosen when a kernel is defined, so they need a process of their own."""

import importlib
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable

import pytest
import torch

from dsv4_kernels import memory
from sglang_dsv4 import env


def _fault_of(check, faults):
    torch.manual_seed(0)
    try:
        check()
    except faults:
        return traceback.format_exc()
    return ""


def _environment():
    return env.snapshot() | {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(path for path in sys.path if path)}


class Interpreter:
    """A process that imports Triton once and makes one check after another; a new one if it ends."""

    def __init__(self) -> None:
        self._process = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def _start(self):
        return subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.interpreting"],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __call__(self, check: Callable[[], None]) -> str:
        """The fault of a check, a function of a test module without arguments; "" for none."""
        if self._process is None:
            self._process = self._start()
        self._process.stdin.write(f"{check.__module__} {check.__name__}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("fault "):
                return json.loads(line.removeprefix("fault "))
        self.end()
        self._errors.seek(0)
        return f"the interpreting process ended:\n{self._errors.read()[-4000:]}"

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


def interpreted_checks(small: Iterable[Callable], long: Iterable[Callable] = ()) -> list:
    """Parameters of a test that interprets checks: the small ones in every run, the others in `make test-long`."""
    marks = (pytest.mark.slow, pytest.mark.long)
    return [pytest.param(check, id=check.__name__) for check in small] + [
        pytest.param(check, id=check.__name__, marks=marks) for check in long
    ]


def make_checks(checks, faults=(AssertionError,)):
    """In a process of its own: make checks, each a function by its name, and print ``{check: "" or its fault}``."""
    torch.set_num_threads(1)
    memory.set_poison(True)
    print(json.dumps({name: _fault_of(check, faults) for name, check in checks.items()}))


def interpreted(module):
    """In a test: what a module whose ``main`` calls `make_checks` printed."""
    run = subprocess.run([sys.executable, "-m", module], env=_environment(), capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def serve():
    """What an `Interpreter` runs: read ``module check``, answer ``fault <json>``."""
    torch.set_num_threads(1)
    memory.set_poison(True)
    for line in sys.stdin:
        module, name = line.split()
        check = getattr(importlib.import_module(module), name)
        print("fault", json.dumps(_fault_of(check, (AssertionError,))), flush=True)


if __name__ == "__main__":
    serve()
