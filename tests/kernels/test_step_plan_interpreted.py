"""The fused step plan under Triton's CPU interpreter."""

import pytest

from tests.kernels.interpreting import interpreted
from tests.kernels.step_plan_checks import CHECKS


@pytest.fixture(scope="module")
def results():
    return interpreted("tests.kernels.step_plan_checks")


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(results, check):
    assert results[check] == ""
