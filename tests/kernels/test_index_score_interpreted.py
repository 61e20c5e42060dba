"""The fused indexer's logic under Triton's CPU interpreter."""

import pytest

from tests.kernels.index_score_checks import CHECKS
from tests.kernels.interpreting import interpreted


@pytest.fixture(scope="module")
def results():
    return interpreted("tests.kernels.index_score_checks")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(results, check):
    assert results[check] == ""
