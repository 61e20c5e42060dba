"""The attention operations' kernels on a GPU: the checks of `tests.kernels.attention_checks`."""

import pytest

from tests.kernels.attention_checks import CHECKS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("check", CHECKS)
def test_as_interpreted(check):
    CHECKS[check](device="cuda")
