"""FlashMLA attention without a GPU: our kernels interpreted, FlashMLA's as plain loops."""

import pytest

from tests.attention.flashmla_checks import CHECKS
from tests.kernels.interpreting import interpreted


@pytest.fixture(scope="module")
def results():
    return interpreted("tests.attention.flashmla_checks")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_model_of_the_kernels(results, check):
    assert results[check] == ""
