"""The server process: it always ends, with all its children, and says why when it ends by itself."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_dsv4.check.demo import server
from sglang_dsv4.check.demo.server import PORTS, Server, ServerDiedError, active_line, end_group, free_port

# Starts a child that ignores the request to end, as a hanging scheduler would.
STUBBORN = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than an entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def make_server(tmp_path: Path, code: str) -> Server:
    server = Server(tmp_path / "checkpoint", tmp_path / "logs" / "server.log", ())
    server._command = [sys.executable, "-c", code]
    return server


def wait_for_log(server: Server) -> list[str]:
    deadline = time.monotonic() + 20
    while not server.log_lines():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return server.log_lines()


def test_ends_when_the_block_is_left_by_an_error(tmp_path: Path):
    server = make_server(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    with pytest.raises(KeyboardInterrupt), server:
        pid = int(wait_for_log(server)[0])
        server.check_alive()
        assert is_running(pid)
        raise KeyboardInterrupt
    assert not is_running(pid)


def test_a_deaf_child_is_ended_too(tmp_path: Path):
    leader = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True)
    child = int(leader.stdout.readline())
    end_group(leader, patience_s=0.3)
    assert leader.poll() is not None
    deadline = time.monotonic() + 5
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_dead_server_shows_the_end_of_its_log(tmp_path: Path):
    code = "[print('line', i) for i in range(100)]; raise SystemExit(7)"
    with pytest.raises(ServerDiedError, match="status 7") as caught, make_server(tmp_path, code) as server:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            server.check_alive()
            time.sleep(0.02)
    assert "line 99" in str(caught.value) and "line 5\n" not in str(caught.value)


def test_command_names_what_is_served(tmp_path: Path):
    server = Server(tmp_path / "tiny", tmp_path / "log", ("--dtype", "float32"))
    command = " ".join(server._command)
    assert f"--model-path {tmp_path / 'tiny'}" in command
    assert "--enable-dsv4-compressed-kv" in command and command.endswith("--dtype float32")
    assert server.url == f"http://127.0.0.1:{server.port}"


def test_active_line_is_found_behind_the_loggers_prefix():
    lines = ["[2026-01-01] INFO: loading", "[2026-01-01 TP0] sglang_dsv4 active: CompressedKVCache", "sglang_dsv4 actively"]
    assert active_line(lines) == "sglang_dsv4 active: CompressedKVCache"
    assert active_line(lines[:1]) is None


def test_free_ports_are_valid():
    assert len({free_port() for _ in range(20)} & set(PORTS)) > 18


def test_a_port_that_is_taken_is_not_given(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        held = taken.getsockname()[1]
        monkeypatch.setattr(server, "PORTS", [held] * 99 + [free_port()])
        assert free_port() != held
        monkeypatch.setattr(server, "PORTS", [held] * 100)
        with pytest.raises(OSError, match="expected a free one among 100"):
            free_port()


def test_a_proxy_does_not_come_between_a_server_and_itself(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    hosts = ("127.0.0.1", "example.org", "example.com")
    code = f"from urllib.request import proxy_bypass as b; print([bool(b(host)) for host in {hosts}], flush=True)"
    with make_server(tmp_path, code) as server:
        assert wait_for_log(server) == ["[True, True, False]"]
