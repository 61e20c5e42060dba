"""Plant each fault of tests/mutations.json in a copy of the checkout, one at a time, and see its test fail.

    python tools/mutations.py            # all of them, a few seconds each
    python tools/mutations.py regions    # those whose file, name or test contains the text

Run by `make mutations`. A fault is a line of the source and what it becomes; the line must stand in the file exactly once.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "sglang_dsv4",
    "kernels",
    "tests",
    "docs",
    "examples",
    "cpu-shims",
    "tools",
    "constraints",
    "pyproject.toml",
    "README.md",
)


def main(wanted: list[str]) -> int:
    """Run the faults whose text contains one of ``wanted``; 1 where a test passed with its fault."""
    faults = json.loads((ROOT / "tests" / "mutations.json").read_text(encoding="utf-8"))
    faults = [fault for fault in faults if not wanted or any(text in json.dumps(fault) for text in wanted)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        for number, fault in enumerate(faults, 1):
            died = plant(copy, fault)
            survivors += not died
            print(
                f"{number:3d} {'dies    ' if died else 'SURVIVES'} {fault['file']}: {fault['fault']}  [{fault['test']}]",
                flush=True,
            )
    print(f"{len(faults) - survivors} of {len(faults)} faults are noticed")
    return int(survivors > 0)


def plant(copy: Path, fault: dict[str, str]) -> bool:
    """Whether the test fails with the fault, which is taken out again."""
    file = copy / fault["file"]
    sound = file.read_text(encoding="utf-8")
    if sound.count(fault["old"]) != 1:
        raise SystemExit(f"{fault['file']}: expected once, found {sound.count(fault['old'])} times: {fault['old']!r}")
    file.write_text(sound.replace(fault["old"], fault["new"]), encoding="utf-8")
    environment = ["env", f"PYTHONPATH={copy}{os.pathsep}{copy / 'kernels'}", "PYTHONDONTWRITEBYTECODE=1"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not long"]
    try:
        run = subprocess.run(
            [*environment, *pytest, *fault["test"].split()], cwd=copy, capture_output=True, text=True, timeout=600
        )
    finally:
        file.write_text(sound, encoding="utf-8")
    if run.returncode not in (0, 1):  # pytest's own fault, not the planted one
        raise SystemExit(f"{fault['test']}: pytest ended with {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
