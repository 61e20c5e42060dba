"""Servers as in the tests of the plug-in, and the checkpoints and oracle of the runtime's."""

from tests.plugin.conftest import tiny, warm
from tests.runtime.conftest import checkpoint, oracle, small_checkpoint

__all__ = ["checkpoint", "oracle", "small_checkpoint", "tiny", "warm"]
