"""`make env`: one clear sentence for what stands in its way, and nothing to do the second time."""

import importlib.util
import json
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "make_env.py"
Usage = namedtuple("Usage", "total used free")
Version = namedtuple("Version", "major minor micro")


@pytest.fixture
def tool(tmp_path) -> ModuleType:
    """The script, at work in a small project of its own; it must not start pip."""
    (tmp_path / "constraints").mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / "cpu-shims").mkdir()
    (tmp_path / "constraints" / "cpu.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").touch()
    script = tmp_path / "tools" / "make_env.py"
    script.write_bytes(TOOL.read_bytes())
    spec = importlib.util.spec_from_file_location("make_env", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_ready(tool: ModuleType) -> None:
    tool.PYTHON.parent.mkdir(parents=True)
    tool.PYTHON.touch()
    tool.STAMP.write_text(json.dumps(tool.wanted()), encoding="utf-8")


def test_a_ready_environment_is_left_alone(tool, monkeypatch):
    make_ready(tool)
    monkeypatch.setattr(sys, "argv", ["make_env.py"])
    monkeypatch.setattr(tool, "pip_install", None)
    assert tool.main() == 0


@pytest.mark.parametrize("path", ["constraints/cpu.txt", "pyproject.toml", "cpu-shims/new.py"])
def test_changed_inputs_are_noticed(tool, path):
    make_ready(tool)
    (tool.ROOT / path).write_text("torch==2.14.0\n", encoding="utf-8")
    assert not tool.is_ready()


def test_an_environment_that_was_cut_short_is_not_ready(tool):
    make_ready(tool)
    tool.STAMP.write_text("{}", encoding="utf-8")
    assert not tool.is_ready()


def test_another_python_asks_for_another_environment_if_it_can_make_one(tool, monkeypatch):
    make_ready(tool)
    monkeypatch.setattr(sys, "version_info", Version(3, 12 if sys.version_info[1] == 11 else 11, 0))
    assert not tool.is_ready()
    monkeypatch.setattr(sys, "version_info", Version(3, 14, 0))
    assert tool.is_ready()


def test_a_wrong_python_is_named(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", Version(3, 9, 0))
    assert tool.main() == 1
    assert "needs Python 3.11 or 3.12, and" in capsys.readouterr().err


def test_a_version_that_has_no_pins_is_named(tool, monkeypatch, capsys):
    make_ready(tool)
    for version in ("0.5.17", "0.5.23"):
        tool.pins_of(version).touch()
    tool.STAMP.write_text(json.dumps(tool.wanted()), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["make_env.py", "0.5.20"])
    assert tool.main() == 1
    assert "SGLANG=0.5.20: expected one of 0.5.17, 0.5.23" in capsys.readouterr().err


def test_a_ready_layer_is_left_alone(tool, monkeypatch):
    tool.pins_of("0.5.23").touch()
    make_ready(tool)
    monkeypatch.setattr(sys, "argv", ["make_env.py", "0.5.23"])
    layer = tool.ROOT / ".venv-0.5.23"
    layer.mkdir()
    (layer / "stamp.json").write_text(json.dumps(tool.wanted()), encoding="utf-8")
    monkeypatch.setattr(tool.subprocess, "run", None)
    assert tool.main() == 0
    # The twin: pins that have changed, and it would be made again.
    tool.pins_of("0.5.23").write_text("sglang==0.5.23\n", encoding="utf-8")
    tool.STAMP.write_text(json.dumps(tool.wanted()), encoding="utf-8")
    with pytest.raises(TypeError):
        tool.main()


def test_a_full_disk_is_named(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", Version(3, 11, 0))
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _: Usage(10**10, 9 * 10**9, 10**9))
    assert tool.main() == 1
    assert "needs 4 GB of free disk" in capsys.readouterr().err


def test_a_foreign_environment_is_not_removed(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", Version(3, 11, 0))
    tool.PYTHON.parent.mkdir(parents=True)
    tool.PYTHON.touch()
    assert tool.main() == 1
    assert tool.PYTHON.exists()
    assert "is not an environment that `make env` made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        (
            "WARNING: Retrying: NewConnectionError\nERROR: No matching distribution found for torch==2.13.0",
            "cannot reach its package index",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0", "has no torch==2.13.0 for this"),
        ("ERROR: Wheel is broken\n", "pip failed: ERROR: Wheel is broken"),
        ("", "no reason given"),
    ],
)
def test_the_reason_for_a_failed_install_is_one_sentence(tool, output, reason):
    assert reason in tool.explain(output)
    assert "\n" not in tool.explain(output)
