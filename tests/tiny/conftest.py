"""The tiny checkpoint of the runtime's tests."""

from tests.runtime.conftest import checkpoint

__all__ = ["checkpoint"]
