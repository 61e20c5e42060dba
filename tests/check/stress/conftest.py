"""Servers as in the tests of the plug-in, and the checkpoint of the runtime's."""

from tests.plugin.conftest import tiny, warm
from tests.runtime.conftest import small_checkpoint

__all__ = ["small_checkpoint", "tiny", "warm"]
