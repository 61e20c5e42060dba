"""Servers as in the tests of the plug-in."""

from tests.plugin.conftest import tiny, warm

__all__ = ["tiny", "warm"]
