"""The stress test against a real tiny server, and what happens to one that is hurt."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from rich.progress import Progress

from sglang_dsv4.stress.client import StressClient
from sglang_dsv4.stress.command import TINY_SERVER
from sglang_dsv4.stress.drive import Load, drive
from sglang_dsv4.stress.session import stress_server
from tests.plugin.serving import generate, prompt, request_body, serving

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.long]

ARGUMENTS = (*TINY_SERVER, "--sleep-on-idle")
PAGES = 60


def stress(server, requests=60, seed=3):
    load = Load(seed, 0, requests, 0.0, concurrency=8)
    with Progress(disable=True) as progress:
        return asyncio.run(
            stress_server(server.url, load, progress, target="URL", bound=None, memory_bytes=None)
        )


@pytest.fixture(scope="module")
def server(warm, tiny):
    with serving(warm, tiny, ARGUMENTS) as running:
        yield running


def test_a_short_run_is_right(server):
    run = stress(server)
    assert run.faults == []
    assert run.findings.num_answers > 50 and run.findings.largest <= run.bound < 1e-2
    assert run.control and run.end["usage"]["history_pages"]["total"] == PAGES


def test_one_request_larger_than_the_cache_is_refused_and_the_server_lives(server):
    body = request_body(prompt(PAGES * 256 + 300, salt=2), 4)
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=120)
    assert 400 <= reply.status_code < 500, reply.text
    assert "longer than" in reply.text or "exceeds" in reply.text
    assert stress(server, requests=12, seed=4).faults == []


def test_a_slow_client_gets_all_and_holds_up_nobody(server):
    body = {**request_body(prompt(20, salt=3), 40), "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: "))
        next(lines)
        # Beside one that does not read: another is served, whole.
        started = time.monotonic()
        assert len(generate(server, prompt(9, salt=5))[0]) == 9
        assert time.monotonic() - started < 60
        time.sleep(2)
        *_, last, done = lines
    assert done == "data: [DONE]" and '"type":"length"' in last.replace(" ", "")


def test_killed_in_a_burst_and_started_again_on_its_port(warm, tiny):
    done, has_begun = [], threading.Event()

    async def burst(url):
        client = StressClient(url)

        def step(outcome):
            done.append(outcome)
            if len(done) == 10:
                has_begun.set()

        try:
            return await drive(client.send, Load(5, 0, 200, 0.0, 24), step, lambda: False)
        finally:
            await client.close()

    with ThreadPoolExecutor(1) as pool:
        with serving(warm, tiny, ARGUMENTS) as first:  # its end is a kill -9
            sending = pool.submit(lambda: asyncio.run(burst(first.url)))
            assert has_begun.wait(timeout=240)
        outcomes = sending.result()
    assert len(outcomes) == 200 and sum(outcome.status == 0 for outcome in outcomes) >= 24
    with serving(warm, tiny, ARGUMENTS, port=first.port) as again:
        assert stress(again, requests=20, seed=5).faults == []
