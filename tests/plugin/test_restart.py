"""A server that is killed with a request in flight, and started again on the same port, with fp8 rows."""

import os
import signal

import httpx
import pytest

from sglang_dsv4.demo.server import Server
from sglang_dsv4.runtime.oracle import Oracle, comparison_bound
from tests.plugin.serving import generate, prompt, request_body, wait_until_ready
from tests.plugin.warm import COPIES, Program

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

ARGUMENTS = (
    "--dtype", "float32", "--dsv4-kv-format", "fp8_584", "--chunked-prefill-size", "256", "--sleep-on-idle",
)  # fmt: skip


@pytest.fixture
def start(warm, tiny, tmp_path):
    """Start a server on a port; its address, and the id of its process group, which ends with the test."""
    groups = []

    def start(port):
        server = Server(tiny, tmp_path / "unused.log", ARGUMENTS, port=port)
        group, output = warm.start(Program(server._command[1:], before=COPIES))
        groups.append(group)
        wait_until_ready(server, lambda: check_alive(group, output))
        return server, group

    yield start
    for group in groups:
        kill(group)


def check_alive(group, output):
    """Raise once the process has ended; a zombie, since nobody waits for it."""
    with open(f"/proc/{group}/stat") as stat:
        assert stat.read().rpartition(")")[2].split()[0] != "Z", output.read_text()[-3000:]


def kill(group):
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def test_a_killed_server_restarts_on_its_port(start, tiny):
    server, group = start(None)
    with pytest.raises(httpx.TimeoutException):
        body = request_body(prompt(500, salt=6), 400)
        httpx.post(f"{server.url}/generate", json=body, timeout=0.5)
    kill(group)
    again, _ = start(server.port)
    assert again.port == server.port
    cold, hit = generate(again, prompt(300, salt=9)), generate(again, prompt(300, salt=9))
    assert (cold[2], hit[2]) == (0, 256)
    oracle = Oracle(tiny)
    sequence = prompt(300, salt=9) + cold[0][:-1]
    expected = oracle.logprobs(sequence, row_format="fp8_584")[299:]
    bound = comparison_bound(0.0, oracle.arithmetic_error(sequence, "fp8_584")[299:].max().item())
    for tokens, logprobs, _ in (cold, hit):
        if tokens == cold[0]:
            assert (logprobs - expected).abs().max().item() <= bound
    assert (hit[1][0] - cold[1][0]).abs().max().item() <= 2 * bound
