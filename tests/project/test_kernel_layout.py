"""One name finds all of an operation: its reference, its kernel, and its tests."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


def small_checks(path: Path) -> int:
    """How many checks a test file interprets in every run."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SMALL":
            return len(node.value.elts)
    return 0


def faults(root: Path) -> list[str]:
    """What is missing, by operation."""
    found = []
    for folder in sorted((root / "kernels" / "dsv4_kernels").iterdir()):
        if not folder.is_dir() or not any(path.suffix != ".pyc" for path in folder.rglob("*") if path.is_file()):
            continue  # what an operation that is gone has left in a checkout
        op, naive, test = folder.name, folder / "naive.py", root / "tests" / "kernels" / f"test_{folder.name}.py"
        if not naive.exists():
            found.append(f"{op}: no naive.py")
        elif not any(name.startswith("naive_") for name in functions(naive)):
            found.append(f"{op}: naive.py has no naive_ function")
        elif "Equation:" not in naive.read_text(encoding="utf-8"):
            found.append(f"{op}: naive.py cites no equation")
        if not test.exists():
            found.append(f"{op}: no tests/kernels/{test.name}")
        elif (folder / "fused.py").exists() and not ("test_interpreted" in functions(test) and small_checks(test)):
            found.append(f"{op}: {test.name} interprets no small check")
        if "triton" in (folder / "__init__.py").read_text(encoding="utf-8") or "fused import" in (
            folder / "__init__.py"
        ).read_text(encoding="utf-8"):
            found.append(f"{op}: __init__.py imports Triton")
    return found


def test_every_operation_is_whole():
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("kernels/dsv4_kernels/op/naive.py", None, "op: no naive.py"),
        ("kernels/dsv4_kernels/op/naive.py", 'def other():\n    """Equation: y = x"""', "op: naive.py has no naive_ function"),
        ("kernels/dsv4_kernels/op/naive.py", "def naive_op():\n    pass", "op: naive.py cites no equation"),
        ("tests/kernels/test_op.py", None, "op: no tests/kernels/test_op.py"),
        ("tests/kernels/test_op.py", "def test_interpreted():\n    pass", "op: test_op.py interprets no small check"),
        (
            "tests/kernels/test_op.py",
            "SMALL = ()\ndef test_interpreted():\n    pass",
            "op: test_op.py interprets no small check",
        ),
        ("tests/kernels/test_op.py", "SMALL = (len,)", "op: test_op.py interprets no small check"),
        ("kernels/dsv4_kernels/op/__init__.py", "from dsv4_kernels.op.fused import op", "op: __init__.py imports Triton"),
    ],
)
def test_what_is_missing_is_found(tmp_path, file, text, fault):
    files = {
        "kernels/dsv4_kernels/op/__init__.py": "from dsv4_kernels.op.naive import naive_op",
        "kernels/dsv4_kernels/op/naive.py": 'def naive_op():\n    """Equation: y = x"""',
        "kernels/dsv4_kernels/op/fused.py": "def op():\n    pass",
        "tests/kernels/test_op.py": "SMALL = (len,)\ndef test_interpreted():\n    pass",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    assert faults(tmp_path) == []
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text, encoding="utf-8")
    assert faults(tmp_path) == [fault]
