"""What the commands refuse before the first second of work, and how they fail."""

import subprocess
import sys

import pytest
from rich.console import Console

from sglang_dsv4.check.command_line import run_guarded
from sglang_dsv4.check.server import ServerDiedError, free_port
from sglang_dsv4.cli import main

STRESS, COMPARE = ["stress", "--tiny"], ["compare", "--device", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([*STRESS, "--json", "/nosuch/x.json"], "--json /nosuch/x.json: expected a file in a folder that exists"),
        ([*STRESS, "--plot", "/nosuch/x.png"], "--plot /nosuch/x.png: expected a file in a folder that exists"),
        ([*STRESS, "--plot", "x.xyz"], "--plot x.xyz: expected matplotlib and a name that ends in .png"),
        ([*STRESS, "--minutes", "-1"], "--minutes: expected more than 0, got -1.0"),
        ([*STRESS, "--requests", "0"], "--requests: expected more than 0, got 0"),
        ([*STRESS, "--concurrency", "0"], "--concurrency: expected more than 0, got 0"),
        (["stress", "--runtime", "nosuch"], "--runtime nosuch: expected a folder with config.json, got none"),
        ([*COMPARE, "--json", "/nosuch/x.json"], "--json /nosuch/x.json: expected a file in a folder that exists"),
        ([*COMPARE, "--model", "nosuch"], "--model nosuch: expected a folder with config.json, got none"),
        ([*COMPARE, "--answers", "nosuch"], "--answers nosuch: expected a file, got none"),
        ([*COMPARE, "--ways", "foo"], "--ways: expected graph-N or eager-N, N a multiple of 256, got 'foo'"),
        ([*COMPARE, "--ways", "eager-0,eager-256"], "--ways: expected graph-N or eager-N"),
        ([*COMPARE, "--ways", "eager-256"], "--ways: expected two or more on a CPU"),
        ([*COMPARE, "--longest", "0"], "--longest: expected more than 0, got 0"),
        ([*COMPARE, "--exact", "-1"], "--exact: expected 0 or more, got -1"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(tmp_path, capsys, arguments, fault):
    build = tmp_path / "build"
    assert main([*arguments, "--build-dir", str(build)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert f"FAILED {fault}" in printed
    assert not build.exists()


def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["compare", "--device", "cuda", "--build-dir", str(tmp_path / "build")]) == 1
    assert "--device cuda: expected a CUDA device, found none" in capsys.readouterr().out
    assert not (tmp_path / "build").exists()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    arguments = [*COMPARE, "--ways", "foo", "--json", str(tmp_path / "x.json"), "--build-dir", str(tmp_path / "build")]
    assert main(arguments) == 1
    assert "expected a file in a folder that exists and can be written to" in " ".join(capsys.readouterr().out.split())


def test_a_result_may_go_into_the_build_folder_that_is_yet_to_be_made(tmp_path, capsys):
    build = tmp_path / "build"
    arguments = ["--build-dir", str(build), "--json", str(build / "x.json"), "--ways", "foo"]
    assert main([*COMPARE, *arguments]) == 1
    assert "FAILED  --ways" in capsys.readouterr().out


def test_a_server_that_is_not_there_is_named(capsys):
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["stress", url]) == 1
    assert f"FAILED {url}: ConnectError: " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "error", [ServerDiedError("status 3"), TimeoutError("not ready"), ValueError("other"), OSError("disk")]
)
def test_a_failure_is_one_line(error, capsys):
    def fail():
        raise error

    assert run_guarded(fail, Console(), "url: ") == 1
    assert capsys.readouterr().out.strip() == f"FAILED  url: {error}"


@pytest.mark.parametrize("command", ["demo", "stress --tiny"])
def test_ctrl_c_ends_with_130(command, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    for module in ("demo", "stress"):
        monkeypatch.setattr(f"sglang_dsv4.check.{module}.command.ready_checkpoint", interrupted)
    assert main([*command.split(), "--build-dir", str(tmp_path)]) == 130


def test_commands_load_without_transformers_and_bench_without_what_only_servers_need():
    code = """
import sys
servers = ("sglang", "flashinfer", "flash_mla", "deep_gemm", "aiohttp", "httpx_sse")
sys.modules.update(dict.fromkeys(("transformers", *servers)))
import sglang_dsv4.bench.command
for name in servers:
    del sys.modules[name]
import sglang_dsv4.check.compare.command
"""
    subprocess.run([sys.executable, "-c", code], check=True)
