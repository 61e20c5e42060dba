"""Tests of the plug-in import SGLang the way a server without a GPU does."""

import pytest
import torch

from sglang_dsv4 import env
from sglang_dsv4.tiny import TinySpec, write_tiny_checkpoint
from tests.plugin.warm import Warm

# SGLang decides at import whether it is on a CPU.
if not torch.cuda.is_available():
    env.set_default("SGLANG_USE_CPU_ENGINE", "1")


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A process with SGLang imported; see `tests.plugin.warm`."""
    with Warm(tmp_path_factory.mktemp("warm")) as process:
        yield process


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny checkpoint, that nobody changes."""
    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_tiny_checkpoint(path, TinySpec())
    return path
