"""The fused kernels' logic under Triton's CPU interpreter, with integer casts instead of a GPU's."""

import pytest

from tests.kernels.fused_checks import CHECKS
from tests.kernels.interpreting import interpreted


@pytest.fixture(scope="module")
def results():
    return interpreted("tests.kernels.fused_checks")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(results, check):
    assert results[check] == ""
