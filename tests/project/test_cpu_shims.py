"""The CPU stand-ins: SGLang starts with them, they refuse to be used, and they give way to the real packages."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sglang_dsv4 import env
from tests.project.wheels import ROOT, build_wheel, install, python

FOLDER = "sglang_dsv4_cpu_shims"
# A copy of this process for each stand-in, without it; the other packages are imported once.
START = """
import json, os, sys
import torch, transformers

def start():
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.model_executor.model_runner
    import sglang.srt.models.deepseek_v4
    import sglang.srt.entrypoints.engine

def without(name):
    sys.modules[name] = None
    try:
        start()
    except ModuleNotFoundError as error:
        return str(error)
    return "started"

assert not {"torchvision", "sgl_kernel", "sglang"} & set(sys.modules)
for name in ("torchvision", "sgl_kernel"):
    if not os.fork():
        print(f"START {name}: {without(name)}", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    project = tmp_path_factory.mktemp("shims") / "project"
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "cpu-shims", project, ignore=ignored)
    return build_wheel(project)


def stand_in(code: str) -> str:
    """Run code with the stand-ins alone on the path; what it printed, and the error it ended with."""
    done = python(code, site=ROOT / "cpu-shims" / FOLDER, cwd=ROOT / "cpu-shims")
    return done.stdout + done.stderr


def make_real(site: Path) -> None:
    for name in ("sgl_kernel", "torchvision"):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("OWNER = 'real'\n", encoding="utf-8")


@pytest.fixture(scope="module")
def started() -> list[str]:
    """Imports of SGLang's server in this environment, as on a machine without a GPU."""
    variables = {**env.snapshot(), "SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("START ")]


@pytest.mark.sglang
@pytest.mark.long
@pytest.mark.parametrize("name", ["sgl_kernel", "torchvision"])
def test_sglang_does_not_start_without_them(started, name):
    """The day this fails, the stand-in can go. With both it starts: see `tests/plugin/test_loads_in_sglang.py`."""
    (line,) = (line for line in started if line.startswith(f"START {name}: "))
    assert "No module named" in line or f"import of {name}" in line


@pytest.mark.parametrize("real_first", [True, False])
def test_real_packages_win(real_first, wheel, tmp_path):
    site = tmp_path / "site"
    if real_first:
        make_real(site)
    install(wheel, site)
    if not real_first:
        make_real(site)
    done = python("import sgl_kernel, torchvision; print(sgl_kernel.OWNER, torchvision.OWNER)", site=site, cwd=tmp_path)
    assert done.stdout.split() == ["real", "real"], done.stderr


def test_stand_ins_are_found_where_nothing_real_is(wheel, tmp_path):
    install(wheel, tmp_path / "site")
    code = "import sgl_kernel, torchvision; print(sgl_kernel.__version__, torchvision.__version__)"
    done = python(code, site=tmp_path / "site", cwd=tmp_path)
    assert done.stdout.split() == ["0.0.0+standin", "0.28.0+standin"], done.stderr


def test_the_wheel_writes_no_file_of_a_real_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {FOLDER, f"{FOLDER}.pth", f"{FOLDER}-0.1.0.dist-info"}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (
            "import sgl_kernel; sgl_kernel.copy_all_layer_kv_cache_cpu(1)",
            "NotImplementedError: sgl_kernel.copy_all_layer_kv_cache_cpu: ",
        ),
        ("from sgl_kernel import rmsnorm", "ImportError: cannot import name 'rmsnorm'"),
        ("import sgl_kernel; sgl_kernel.rmsnorm", "AttributeError: sgl_kernel.rmsnorm: this sgl_kernel is a stand-in"),
        ("from sgl_kernel.flash_mla import get_mla_metadata", "ModuleNotFoundError: No module named"),
        ("from torchvision.io import decode_jpeg; decode_jpeg(b'')", "NotImplementedError: torchvision.io.decode_jpeg: "),
        (
            "from torchvision.transforms.functional import pil_to_tensor as f; f(None)",
            "NotImplementedError: torchvision.transforms.functional.pil_to_tensor: ",
        ),
        (
            "from torchvision.transforms.v2 import functional as f; f.resize(None)",
            "AttributeError: torchvision.transforms.v2.functional.resize: ",
        ),
        ("import torchvision; torchvision.ops", "AttributeError: torchvision.ops: "),
    ],
)
def test_using_a_stand_in_is_refused_by_name(code, error):
    assert error in stand_in(code)
