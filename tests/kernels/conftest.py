"""The interpreting process that the kernels' tests share."""

import pytest

from tests.kernels.interpreting import Interpreter


@pytest.fixture(scope="session")
def interpret():
    """Make a check under Triton's interpreter: ``interpret(check) == ""`` if it holds."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.end()
