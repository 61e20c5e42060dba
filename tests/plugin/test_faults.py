"""A real server when things go wrong: killed, told to stop, its memory damaged. Answers are checked as `stress` does."""

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from rich.progress import Progress

from sglang_dsv4.cli import main
from sglang_dsv4.demo.client import Client
from sglang_dsv4.demo.server import Server
from sglang_dsv4.demo.start import wait_until_healthy
from sglang_dsv4.runtime.oracle import Oracle
from sglang_dsv4.stress.drive import Load
from sglang_dsv4.stress.session import stress_server
from tests.plugin.serving import generate, post, prompt, read, request_body, running_in, serving
from tests.plugin.test_server import check
from tests.plugin.warm import COPIES

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

# Exact rows, so that the comparison is sharp, and 16 pages.
SERVER = (
    "--dtype", "float32", "--dsv4-kv-format", "fp32", "--max-total-tokens", "4096", "--swa-full-tokens-ratio", "1.0",
    "--schedule-conservativeness", "0.01", "--chunked-prefill-size", "512", "--sleep-on-idle",
)  # fmt: skip
# Runs before every step but the first ones of a process: code between the two halves sees `self` and `forward_batch`.
BEFORE_STEPS = """
from sglang_dsv4.plugin import backend
original = backend.CompressedKVBackend.init_forward_metadata
def before_step(self, forward_batch):
    if forward_batch.forward_mode.is_decode():
        plant(self, forward_batch)
    original(self, forward_batch)
backend.CompressedKVBackend.init_forward_metadata = before_step
"""
# A value of the first request's first CSA entry, once it has 40 tokens.
WRONG_ROW = """
def plant(self, batch):
    if int(batch.seq_lens_cpu[0]) == 40:
        pages = self._req_to_token[batch.req_pool_indices[0], 0] // 256
        cache = self.cache
        layer = next(layer for layer in cache.layers if layer.layer.ratio == 4)
        layer.storage.pool[layer.num_window_rows + pages * 64] += 3.0
"""
# Every row of every page that SGLang's allocators hold as free.
NAN_IN_FREE_PAGES = """
planted = []
from sglang.srt.mem_cache.allocator import swa
made = swa.SWATokenToKVPoolAllocator.__init__
def remember(self, *args, **kwargs):
    made(self, *args, **kwargs)
    planted.append(self)
swa.SWATokenToKVPoolAllocator.__init__ = remember
def plant(self, batch):
    import torch
    (allocator,) = planted
    def free(pages):
        return torch.cat([pages.free_pages, pages.release_pages]).long()
    history, window = free(allocator.full_attn_allocator), free(allocator.swa_attn_allocator)
    for layer in self.cache.layers:
        storage, ratio = layer.storage, layer.layer.ratio
        storage.pool[: layer.num_window_rows].unflatten(0, (-1, 256))[window] = float("nan")
        for store in (storage.main, storage.index):
            if store is not None:
                store.boundary[window] = float("nan")
        if ratio:
            storage.pool[layer.num_window_rows :].unflatten(0, (-1, 256 // ratio))[history] = float("nan")
        if storage.index_pool is not None:
            storage.index_pool.unflatten(0, (-1, 64))[history] = float("nan")
"""


@pytest.fixture(scope="module")
def oracle(tiny):
    return Oracle(tiny)


def stress(server, requests, seed=0):
    """A checked run; what is wrong."""
    load = Load(seed, 0, requests, 0.0, concurrency=16)
    with Progress(disable=True) as progress:
        run = asyncio.run(
            stress_server(server.url, load, progress, target="URL", bound=None, memory_bytes=None)
        )
    assert run.findings.num_answers >= requests // 2
    return run.faults


def asked_of_a_dying_server(server, seconds):
    """24 long answers at once; the server is killed in the middle. How many clients lost their connection."""

    def ask(number):
        body = {
            "input_ids": prompt(40, salt=number),
            "sampling_params": {"max_new_tokens": 500, "ignore_eos": True},
        }
        try:
            httpx.post(f"{server.url}/generate", json=body, timeout=120)
        except httpx.TransportError:
            return True
        return False

    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(ask, number) for number in range(24)]
        time.sleep(seconds)
        os.killpg(server.group, signal.SIGKILL)
        return sum(one.result() for one in asked)


@contextmanager
def launched(tiny, log, port=None):
    """A server as a user starts it: nothing of it is copied from a process of the tests."""
    with Server(tiny, log, SERVER, port=port) as server, Progress(disable=True) as progress:
        client = Client(server.url, 264)
        wait_until_healthy(server, client, progress)
        client.close()
        yield server


@pytest.mark.long
def test_killed_ten_times_in_a_row_in_a_burst_and_started_again_on_its_port(tiny, tmp_path):
    port = None
    for number in range(10):
        with launched(tiny, tmp_path / f"{number}.log", port) as server:
            port = server.port
            assert stress(server, 12, seed=number) == []
            assert asked_of_a_dying_server(server, 0.5 + 0.2 * number) == 24
            assert running_in(server.group) == []


@pytest.mark.long
def test_told_to_stop_during_a_prefill_it_ends_and_leaves_no_process(tiny, tmp_path):
    with launched(tiny, tmp_path / "log") as server:
        body = {"input_ids": prompt(3000), "sampling_params": {"max_new_tokens": 50}}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/generate", json=body, timeout=2)
        os.kill(server.group, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while running_in(server.group) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert running_in(server.group) == []


def test_a_small_pool_is_exhausted_and_every_answer_is_right(warm, tiny, oracle):
    """24 prompts of 252 tokens that need a second page while they decode, in 16 pages; and one larger than all."""
    with serving(warm, tiny, SERVER) as server:
        prompts = [prompt(252, salt=number) for number in range(24)]
        together = post(server, "generate", request_body(prompts, 8)).json()
        assert sum(answer["meta_info"]["num_retractions"] for answer in together) > 0
        for input_ids, answer in zip(prompts[::4], together[::4], strict=True):
            check(oracle, input_ids, read(answer))
        body = request_body(prompt(4096), 2)
        assert httpx.post(f"{server.url}/generate", json=body, timeout=60).status_code == 400


def test_nan_in_free_pages_never_surfaces(warm, tiny):
    before = COPIES + NAN_IN_FREE_PAGES + BEFORE_STEPS
    with serving(warm, tiny, SERVER, before=before) as server:
        assert stress(server, 24) == []


def test_a_wrong_row_in_a_live_page_stops_a_server_that_checks_every_step(
    warm, tiny, tmp_path, capsys
):
    flags = ("--dsv4-check", "step", "--dsv4-check-dumps", str(tmp_path))
    before = COPIES + WRONG_ROW + BEFORE_STEPS
    with serving(warm, tiny, SERVER + flags, before=before) as server:
        assert len(generate(server, prompt(5), new_tokens=4)[0]) == 4
        info = httpx.get(f"{server.url}/server_info", timeout=60).json()["internal_states"][0]
        checks = info["sglang_dsv4"]["checks"]
        # Three steps after the first token, beside those of SGLang's own first request.
        assert checks["run"] >= 3 and checks["bytes"] > 0
        assert (checks["level"], checks["failed"]) == ("step", 0)
        body = {**request_body(prompt(30), 30), "rid": "the-request"}
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{server.url}/generate", json=body, timeout=60)
        said = next(line for line in server.log_lines() if "integrity check failed" in line)
        assert "I8 sums: request the-request: layer 1: entry 0 in history page " in said
    (dump,) = tmp_path.iterdir()
    assert main(["inspect", str(dump)]) == 0
    assert "the-request" in capsys.readouterr().out


def test_without_the_check_the_wrong_row_changes_the_answer(warm, tiny, oracle):
    """The twin: nobody stops, and what comes is wrong."""
    with serving(warm, tiny, SERVER, before=COPIES + WRONG_ROW + BEFORE_STEPS) as server:
        check(oracle, prompt(30), generate(server, prompt(30), new_tokens=8))
        with pytest.raises(AssertionError):
            check(oracle, prompt(30), generate(server, prompt(30), new_tokens=14))
