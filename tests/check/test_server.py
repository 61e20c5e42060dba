"""The server process: it always ends, with all its children, and says why when it ends by itself."""

import json
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from sglang_dsv4.check import server as server_module
from sglang_dsv4.check.server import PORTS, Server, ServerDiedError, Side, active_line, end_group, free_port, naming_the_dead

# Starts a child that ignores the request to end, as a hanging scheduler would.
STUBBORN = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(60)
"""


def is_running(pid):
    """Whether a process exists and is more than an entry that nobody has collected."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def make_server(folder, code):
    server = Server(Side("small", True), folder / "checkpoint", folder / "logs")
    server.command = [sys.executable, "-c", code]
    return server


def wait_for_log(server):
    deadline = time.monotonic() + 20
    while not server.log_lines():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return server.log_lines()


def test_ends_when_the_block_is_left_by_an_error(tmp_path):
    server = make_server(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    with pytest.raises(KeyboardInterrupt), server:
        pid = int(wait_for_log(server)[0])
        server.check_alive()
        assert is_running(pid)
        raise KeyboardInterrupt
    assert not is_running(pid)


def test_a_deaf_child_is_ended_too():
    leader = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True)
    child = int(leader.stdout.readline())
    end_group(leader, patience_s=0.3)
    assert leader.poll() is not None
    deadline = time.monotonic() + 5
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_dead_server_shows_the_end_of_its_log(tmp_path):
    code = "[print('line', i) for i in range(100)]; print('a.b.OddError: seven'); print('end'); raise SystemExit(7)"
    with pytest.raises(ServerDiedError, match="status 7") as caught, make_server(tmp_path, code) as server:
        server_module.wait_until_ready([server], limit_s=20)
    assert "line 99" in str(caught.value) and "line 5\n" not in str(caught.value)
    assert server.last_error() == "a.b.OddError: seven"


def test_a_server_that_is_never_ready_is_named_with_its_log(tmp_path):
    with make_server(tmp_path, "import time; time.sleep(60)") as server, pytest.raises(TimeoutError, match="small.*small.log"):
        server_module.wait_until_ready([server], limit_s=0.1)


@pytest.mark.parametrize("error", [httpx.ReadError("gone"), OSError("gone")])
def test_a_lost_connection_is_blamed_on_a_server_that_ended_and_on_no_other(tmp_path, error):
    slowly = make_server(tmp_path, "import sys, time; time.sleep(0.5); sys.exit(7)")
    with slowly as server, pytest.raises(ServerDiedError, match="status 7"), naming_the_dead([server]):
        raise error
    lives = make_server(tmp_path, "import time; time.sleep(60)")
    with lives as server, pytest.raises(type(error), match="gone"), naming_the_dead([server], limit_s=0.6):
        raise error


def test_other_errors_do_not_wait_for_a_server_to_end(tmp_path):
    with make_server(tmp_path, "import sys; sys.exit(7)") as server:
        server._process.wait()
        with pytest.raises(ValueError, match="ours"), naming_the_dead([server]):
            raise ValueError("ours")


def test_the_command_names_what_is_served_and_only_ours_has_the_flag(tmp_path):
    ours, theirs = (
        Server(Side("one", is_ours, ("--dtype", "float32")), tmp_path, tmp_path, port=7) for is_ours in (True, False)
    )
    assert f"--model-path {tmp_path}" in " ".join(ours.command) and ours.command[-2:] == ["--dtype", "float32"]
    assert [part for part in ours.command if part != "--enable-dsv4-compressed-kv"] == theirs.command
    assert ours.url == "http://127.0.0.1:7" and "7" in ours.command and ours.log == tmp_path.resolve() / "one.log"


def test_a_server_on_a_gpu_is_not_told_that_it_is_on_a_cpu(tmp_path):
    for quantization, wanted in (({}, "0"), ({"quant_method": "fp8"}, None)):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        variables = server_module.server_variables(tmp_path, "cuda")
        assert "SGLANG_USE_CPU_ENGINE" not in variables
        assert variables.get("SGLANG_OPT_FP8_WO_A_GEMM") == wanted
    assert server_module.server_variables(tmp_path, "cpu")["SGLANG_USE_CPU_ENGINE"] == "1"


def test_a_paused_server_stands_still_with_its_children_and_their_memory_is_counted(tmp_path):
    """A server that waits for requests spins; while another is measured it must not."""
    size = 64 << 20
    child = f"x = b'x' * {size}\nprint('up', flush=True)\nwhile True: pass"
    server = make_server(tmp_path, f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()")

    def wait_until(reached):
        deadline = time.monotonic() + 10
        while not reached({process.status() for process in server_module.processes(server.group)}):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with server:
        wait_for_log(server)
        assert len(server_module.processes(server.group)) == 2
        assert server_module.group_bytes(server.group) > size
        with server.paused():
            wait_until(lambda found: found == {psutil.STATUS_STOPPED})
        wait_until(lambda found: psutil.STATUS_RUNNING in found and psutil.STATUS_STOPPED not in found)
    assert not server_module.processes(server.group)


def test_active_line_is_found_behind_the_loggers_prefix():
    lines = ["[2026-01-01] INFO: loading", "[2026-01-01 TP0] sglang_dsv4 active: CompressedKVCache", "sglang_dsv4 actively"]
    assert active_line(lines) == "sglang_dsv4 active: CompressedKVCache"
    assert active_line(lines[:1]) is None


def test_a_port_is_free_and_below_those_that_linux_hands_out(monkeypatch):
    assert len({free_port() for _ in range(20)} & set(PORTS)) > 18
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        held = taken.getsockname()[1]
        monkeypatch.setattr(server_module, "PORTS", [held] * 99 + [free_port()])
        assert free_port() != held
        monkeypatch.setattr(server_module, "PORTS", [held] * 100)
        with pytest.raises(OSError, match="expected a free one among 100"):
            free_port()


def test_a_proxy_does_not_come_between_a_server_and_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    hosts = ("127.0.0.1", "example.org", "example.com")
    code = f"from urllib.request import proxy_bypass as b; print([bool(b(host)) for host in {hosts}], flush=True)"
    with make_server(tmp_path, code) as server:
        assert wait_for_log(server) == ["[True, True, False]"]
