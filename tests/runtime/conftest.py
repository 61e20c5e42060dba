"""One tiny checkpoint and its oracle for all tests of this folder."""

import json
from pathlib import Path

import pytest

from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.tiny import TinySpec, write_tiny_checkpoint
from tests.runtime.worlds import SMALL


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the default checkpoint."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(path, TinySpec())
    return path


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> Oracle:
    """It keeps its answers, so tests that ask the same share the work."""
    return Oracle(checkpoint)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint of one layer of each kind, a few milliseconds a step."""
    path = tmp_path_factory.mktemp("small")
    write_tiny_checkpoint(path, SMALL)
    config = json.loads((path / "config.json").read_text())
    # A quarter of a step otherwise; the oracle reads the same file.
    config["hc_sinkhorn_iters"] = 2
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def small_oracle(small_checkpoint: Path) -> Oracle:
    """The small checkpoint's oracle."""
    return Oracle(small_checkpoint)
