"""The promises of tests/conftest.py: seeds, poison, and that nothing is skipped."""

import re
from pathlib import Path

import pytest
import torch

from dsv4_kernels import memory

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def run(pytester: pytest.Pytester, source: str) -> pytest.RunResult:
    """Run a test module under a copy of the conftest, in this process."""
    pytester.makeconftest(CONFTEST.read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers = gpu: needs a CUDA device\naddopts = --strict-markers\n")
    pytester.makepyfile(source)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_fresh_floats_are_nan(dtype):
    assert memory.empty((3, 5), dtype, "cpu").float().isnan().all()


def test_fresh_integers_are_out_of_range():
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert (memory.empty((7,), dtype, "cpu") == torch.iinfo(dtype).max).all()
    assert memory.empty((7,), torch.bool, "cpu").all()


def test_fresh_bytes_are_nan_in_every_packed_format():
    row = memory.empty((64,), torch.uint8, "cpu")
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu):
        assert row.view(dtype).float().isnan().all()


def test_poison_off_leaves_memory_alone(monkeypatch):
    monkeypatch.setattr(torch, "empty", torch.zeros)
    memory.set_poison(False)
    assert (memory.empty((3,), torch.float32, "cpu") == 0).all()


def test_numbers_depend_on_the_name_only(pytester):
    source = "import torch\n"
    source += "".join(f"def test_{x}(): print('{x}', torch.rand(1).item())\n" for x in "ab")
    run(pytester, source).assert_outcomes(passed=2)

    def drawn(*options: str) -> dict[str, str]:
        result = pytester.runpytest_inprocess("-s", "-p", "no:cacheprovider", *options)
        return dict(re.findall(r"\b([ab]) (0\.\d+)", result.stdout.str()))

    together = drawn()
    assert together["a"] != together["b"]
    assert drawn("-k", "test_b") == {"b": together["b"]}


@pytest.mark.parametrize(
    "body", ["pytest.skip('later')", "pytest.importorskip('a_module_that_does_not_exist')", "pytest.xfail('known')"]
)
def test_a_skip_without_the_gpu_mark_fails(pytester, body):
    result = run(pytester, f"import pytest\n\ndef test_it():\n    {body}\n")
    result.assert_outcomes(failed=1)


def test_a_skipped_module_fails(pytester):
    result = run(pytester, "import pytest\npytest.skip('later', allow_module_level=True)\n")
    result.assert_outcomes(errors=1)
    assert result.ret != 0


def test_a_gpu_test_is_skipped_without_a_gpu(pytester, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(pytester, "import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    raise AssertionError\n")
    result.assert_outcomes(skipped=1)
    assert result.ret == 0
