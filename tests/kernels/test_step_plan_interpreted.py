"""The fused step plan under Triton's CPU interpreter."""

import json
import subprocess
import sys

import pytest

from sglang_dsv4 import env
from tests.kernels.step_plan_checks import CHECKS


@pytest.fixture(scope="module")
def results():
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.step_plan_checks"],
        env=env.snapshot()
        | {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(results, check):
    assert results[check] == ""
