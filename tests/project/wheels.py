"""Build and install the distributions of this repository away from it and from the running environment."""

import shutil
import subprocess
import sys
from pathlib import Path

from sglang_dsv4 import env

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "sglang_dsv4", "kernels")


def checked(*command: str, cwd: Path) -> str:
    """Run a command that must succeed; its output."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_project(target: Path) -> Path:
    """Copy what the distribution is built from, so that a build leaves nothing in the checkout."""
    target.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target


def build_wheel(project: Path) -> Path:
    """The wheel of a project, built with the setuptools of this environment and without a network."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-w", "dist")
    checked(*PIP, "wheel", "-q", *options, ".", cwd=project)
    (wheel,) = (project / "dist").glob("*.whl")
    return wheel


def build_editable(project: Path) -> Path:
    """The wheel that ``pip install -e`` installs."""
    (project / "dist-editable").mkdir()
    hook = "from setuptools.build_meta import build_editable; build_editable('dist-editable')"
    checked(sys.executable, "-c", hook, cwd=project)
    (wheel,) = (project / "dist-editable").glob("*.whl")
    return wheel


def install(wheel: Path, site: Path) -> None:
    """Install a wheel, and nothing that it depends on, into a directory."""
    options = ("--no-deps", "--no-index", "--no-compile", "--upgrade", "--target", str(site))
    checked(*PIP, "install", "-q", *options, str(wheel), cwd=wheel.parent)


def python(code: str, *, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter that has the current directory, the standard library and ``site``, in this order."""
    start = f"import site; site.addsitedir({str(site)!r})\n"
    variables = {name: value for name, value in env.snapshot().items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-S", "-c", start + code], capture_output=True, text=True, cwd=cwd, env=variables, check=False
    )
