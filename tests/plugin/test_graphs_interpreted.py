"""Decode graphs with the kernels that a GPU runs, under Triton's CPU interpreter."""

import pytest

from tests.kernels.interpreting import interpreted

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def results():
    return interpreted("tests.plugin.graphs_checks")


@pytest.mark.parametrize("check", ["bf16", "fp8_584"])
def test_on_a_model_of_the_kernel(results, check):
    assert results[check] == ""
