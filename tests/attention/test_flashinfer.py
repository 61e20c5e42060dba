"""FlashInfer attention without a GPU: our kernels interpreted, FlashInfer's planner and kernel as plain loops."""

import pytest

from tests.attention.flashinfer_checks import CHECKS
from tests.kernels.interpreting import interpreted


@pytest.fixture(scope="module")
def results():
    return interpreted("tests.attention.flashinfer_checks")


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_model_of_the_kernel(results, check):
    assert results[check] == ""
