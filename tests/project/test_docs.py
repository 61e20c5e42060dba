"""The documentation says what the code does: its tables, its picture, the messages it quotes, and the paths it names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.generate import PAGES, PICTURE, PICTURE_TOKENS, filled
from sglang_dsv4.cli import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = (ROOT / "sglang_dsv4", ROOT / "tools")
WRITTEN = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FOLDERS = ("benchmarks", "constraints", "cpu-shims", "docs", "examples", "kernels", "sglang_dsv4", "tests", "tools")
# Names whose text a message has in the place of a placeholder.
NAMES = {"ENABLE_FLAG": "--enable-dsv4-compressed-kv"}


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_the_code(name):
    page = (DOCS / name).read_text(encoding="utf-8")
    assert filled(page) == page, "run: .venv/bin/python docs/generate.py"
    stale = page.replace("| `sglang_dsv4_pages` | gauge |", "| `sglang_dsv4_pages` | counter |")
    assert stale != page and filled(stale) == page


def test_the_picture_is_of_a_sequence_as_the_page_says():
    """The text of the picture; how matplotlib draws the rest is its own affair."""
    words = re.findall(r">([^<>\n]+)</text>", PICTURE.read_text(encoding="utf-8"))
    closed = {ratio: divmod(PICTURE_TOKENS, ratio) for ratio in (4, 128)}
    parts = (f"{name} {closed[ratio][0]} entries + {closed[ratio][1]} open" for name, ratio in (("CSA", 4), ("HCA", 128)))
    assert " · ".join([f"{PICTURE_TOKENS} tokens", *parts]) in words
    assert f"{closed[128][1]}/128" in words
    assert f"of {PICTURE_TOKENS} tokens" in (DOCS / "concepts.md").read_text(encoding="utf-8")
    assert f"{PICTURE_TOKENS + 1 - 128} .. {PICTURE_TOKENS - 1}" in words


def texts(tree):
    """Every string of a module, f-strings included, with ``…`` for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else placeholder(part) for part in node.values)


def placeholder(part):
    return NAMES.get(ast.unparse(part.value).rpartition(".")[2], "…")


def is_said(message, said):
    """Whether some string of the code has this text; ``…`` stands for any part of it."""
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
    return any(pattern.search(text) for text in said)


def test_messages_that_are_quoted_are_in_the_code():
    said = [
        text
        for folder in SOURCES
        for path in folder.rglob("*.py")
        for text in texts(ast.parse(path.read_text(encoding="utf-8")))
    ]
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [line for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(quoted) > 20
    assert [message for message in quoted if not is_said(message, said)] == []
    assert not is_said("window pool: expected … pages or more", said)


def quick_start(page):
    """Its program, and what it prints."""
    section = page.partition("## Quick start")[2]
    return re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", section, re.DOTALL).groups()


def test_the_quick_start_prints_what_the_page_says(tmp_path, monkeypatch, capsys):
    program, printed = quick_start((ROOT / "README.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    assert main(["make-tiny", "tiny"]) == 0
    capsys.readouterr()
    exec(compile(program, "README.md", "exec"), {})
    found = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert len(found) > 5 and found == printed.splitlines()


def missing_paths(text):
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text)
    return [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_paths_that_are_named_exist(path):
    assert missing_paths(path.read_text(encoding="utf-8")) == []


def test_a_path_that_does_not_exist_is_found():
    assert missing_paths("see `docs/conf.py`, `docs/none.md`") == ["docs/none.md"]


def test_a_dead_link_fails_the_build(tmp_path):
    """Of four links two are right; the build warns of the others, and each warning is an error to `make docs`."""
    pages = tmp_path / "pages"
    pages.mkdir()
    links = ("two.md", "three.md", "two.md#here", "two.md#there")
    text = "\n".join(f"[link]({link})" for link in links)
    (pages / "index.md").write_text(f"# One\n\n{text}\n\n```{{toctree}}\ntwo\n```\n")
    (pages / "two.md").write_text("# Two\n\n## Here\n")
    (options,) = re.findall(r"-m sphinx (.*) docs build/docs", (ROOT / "Makefile").read_text())
    command = [sys.executable, "-m", "sphinx", *options.split(), "-c", DOCS, pages]
    done = subprocess.run([*command, tmp_path / "built"], capture_output=True, text=True, cwd=ROOT, check=False)
    found = [line for line in done.stderr.splitlines() if "WARNING" in line]
    assert done.returncode and len(found) == 2, done.stderr
    assert "three.md" in found[0] and "there" in found[1]
