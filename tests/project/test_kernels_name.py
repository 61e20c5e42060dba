"""`import kernels` is another project's package, which SGLang depends on: ours never stands in its way.

Our kernels live in `kernels/dsv4_kernels`. The folder `kernels/` is a source root; were it a package, or installed as
one, it would be found in place of theirs.
"""

import zipfile
from pathlib import Path

import pytest

from tests.project.wheels import build_editable, build_wheel, copy_project, install, python

KINDS = ("wheel", "editable", "checkout")


def make_theirs(site: Path) -> None:
    """The other project's distribution, as pip would leave it."""
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("OWNER = 'theirs'\n", encoding="utf-8")
    info = site / "kernels-0.14.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.14.1\n")


def faults(kind: str, project: Path, tmp_path: Path) -> list[str]:
    """What an installation of ``project`` does wrong, with and without theirs beside it.

    Args:
        kind (str): ``wheel``, ``editable``, or ``checkout``: run from the project's folder and not installed.
        project (Path): a copy of the project.
        tmp_path (Path): an empty folder.
    """
    alone, beside, elsewhere = tmp_path / "alone", tmp_path / "beside", tmp_path / "elsewhere"
    for folder in (alone, elsewhere):
        folder.mkdir()
    make_theirs(beside)
    if kind != "checkout":
        wheel = build_wheel(project) if kind == "wheel" else build_editable(project)
        install(wheel, alone)
        install(wheel, beside)
    cwd = project if kind == "checkout" else elsewhere
    found = []
    theirs = python("import kernels; print(kernels.OWNER)", site=beside, cwd=cwd)
    if theirs.stdout.strip() != "theirs":
        found.append(f"import kernels, theirs installed: {theirs.stdout}{theirs.stderr}")
    # A folder without code is all that the checkout may have to show: no file, nothing to import from it.
    nobody = python("import kernels; print(kernels.__file__)", site=alone, cwd=cwd)
    if nobody.stdout.strip() != ("None" if kind == "checkout" else ""):
        found.append(f"import kernels, theirs not installed: {nobody.stdout}")
    if kind != "checkout":
        names = python("import dsv4_kernels; print(dsv4_kernels.__file__)", site=beside, cwd=cwd)
        home = beside if kind == "wheel" else project / "kernels"
        if names.stdout.strip() != str(home / "dsv4_kernels" / "__init__.py"):
            found.append(f"import dsv4_kernels: {names.stdout}{names.stderr}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_theirs_is_found_and_ours_is_dsv4_kernels(kind, tmp_path):
    assert faults(kind, copy_project(tmp_path / "project"), tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_named_kernels_would_be_noticed(kind, tmp_path):
    project = copy_project(tmp_path / "project")
    (project / "kernels" / "__init__.py").touch()
    settings = (project / "pyproject.toml").read_text(encoding="utf-8")
    broken = settings.replace('"dsv4_kernels*"]', '"dsv4_kernels*", "kernels*"]')
    assert broken != settings
    (project / "pyproject.toml").write_text(broken, encoding="utf-8")
    assert faults(kind, project, tmp_path) != []


def test_the_wheel_has_our_modules_and_nothing_else(tmp_path):
    project = copy_project(tmp_path / "project")
    modules = {
        path.relative_to(root).as_posix()
        for root, package in ((project, "sglang_dsv4"), (project / "kernels", "dsv4_kernels"))
        for path in (root / package).rglob("*.py")
    }
    with zipfile.ZipFile(build_wheel(project)) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (entry_points,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
        plugins = wheel.read(entry_points).decode()
    assert files == modules
    assert "[sglang.srt.plugins]\nsglang_dsv4 = sglang_dsv4.plugin.install.entry:register" in plugins
