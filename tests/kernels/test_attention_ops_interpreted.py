"""The attention operations' kernels under Triton's CPU interpreter, with integer casts instead of a GPU's."""

import json
import subprocess
import sys

import pytest

from sglang_dsv4 import env
from tests.kernels.attention_checks import CHECKS


@pytest.fixture(scope="module")
def results():
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.attention_checks"],
        env=env.snapshot()
        | {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(results, check):
    assert results[check] == ""
