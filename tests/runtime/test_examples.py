"""The notebooks of `examples/` run from top to bottom."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
# What somebody who runs a notebook must have seen at its end.
SEEN = {
    "cache_by_hand": ["all entries equal: True", "pages after: 1 - length: 210", "refused: ", "40 of 40 pages are free again"],
    "branching_a_conversation": ["True", "512 from the cache", "refused: Handle("],
    "where_the_bytes_go": ["Flash fp8_584     3850 B per token", "Pro   fp8_584     5511 B"],
}
PLOTS = {"cache_by_hand": 2, "branching_a_conversation": 3, "where_the_bytes_go": 4}


def script_cells(path):
    """The cells of a script in percent format, comments of markdown cells uncommented."""
    for part in re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        body = body.strip("\n")
        if "[markdown]" in head:
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        yield body


def test_there_are_three():
    assert {path.stem for path in NOTEBOOKS} == set(SEEN)


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    for seen in SEEN[path.stem]:
        assert seen in text
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    pictures = sum(kind in ("image/png", "image/svg+xml") for kind in kinds)
    assert pictures == PLOTS[path.stem]
    assert "text/html" in kinds  # the report, as a table


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_the_script_is_the_notebook():
    script = list(script_cells(EXAMPLES / "cache_by_hand.py"))
    notebook = nbformat.read(EXAMPLES / "cache_by_hand.ipynb", as_version=4)
    assert [cell.source for cell in notebook.cells] == script


def test_the_script_runs(tmp_path):
    command = [sys.executable, str(EXAMPLES / "cache_by_hand.py")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert run.returncode == 0, run.stderr
    for seen in SEEN["cache_by_hand"]:
        assert seen in run.stdout
