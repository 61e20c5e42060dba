"""Checks under Triton's CPU interpreter, which is chosen when a kernel is defined: they need a process of their own."""

import json
import subprocess
import sys
import traceback

import torch

from dsv4_kernels import memory
from sglang_dsv4 import env


def make_checks(checks, faults=(AssertionError,)):
    """In that process: make checks, each a function by its name, and print ``{check: "" or its fault}``."""
    torch.set_num_threads(1)
    memory.set_poison(True)
    results = {}
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check()
            results[name] = ""
        except faults:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


def interpreted(module):
    """In a test: what a module whose ``main`` calls `make_checks` printed."""
    run = subprocess.run(
        [sys.executable, "-m", module],
        env=env.snapshot() | {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])
