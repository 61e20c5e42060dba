"""A real server when things go wrong: killed, told to stop, its memory damaged. Answers are checked as `stress` does.

Elsewhere: pages exhausted and clients that leave in `test_server.py`; a request larger than the cache and a slow client in
`tests/check/stress/test_stress_server.py`; damaged files and a full disk in `tests/cache/test_saved.py`.
"""

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from rich.progress import Progress

from sglang_dsv4.check.bound import comparison_bound
from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.check.server import free_port
from sglang_dsv4.check.stress import session
from sglang_dsv4.check.stress.load import Load
from sglang_dsv4.check.stress.server_target import ServerTarget
from sglang_dsv4.cli import main
from tests.plugin.serving import generate, post, prompt, request_body, running_in, serving, wait_for_log, wait_until_ended
from tests.plugin.test_server import check
from tests.plugin.warm import COPIES

pytestmark = [pytest.mark.sglang, pytest.mark.long]

# Exact rows, so that the comparison is sharp, and 16 pages.
SERVER = (
    "--dtype",
    "float32",
    "--dsv4-kv-format",
    "fp32",
    "--max-total-tokens",
    "4096",
    "--swa-full-tokens-ratio",
    "1.0",
    "--schedule-conservativeness",
    "0.01",
    "--chunked-prefill-size",
    "512",
    "--sleep-on-idle",
)
# Runs before every step: code in front of it defines `plant`, which sees the backend and SGLang's ForwardBatch.
BEFORE_STEPS = """
from sglang_dsv4.plugin.serve import backend
original = backend.CompressedKVBackend.init_forward_metadata
def before_step(self, batch):
    plant(self, batch)
    original(self, batch)
backend.CompressedKVBackend.init_forward_metadata = before_step
"""
# The first request's first CSA entry, once it has 40 tokens.
WRONG_ROW = """
def plant(self, batch):
    if batch.forward_mode.is_decode() and int(batch.seq_lens_cpu[0]) == 40:
        page = self._planner._req_to_token[batch.req_pool_indices[0], 0] // 256
        layer = next(layer for layer in self.cache.layers if layer.ratio == 4)
        layer.memory.storage.pool[layer.memory.storage.num_window_rows + page * 64] += 3.0
"""
# Every row of every page that SGLang's allocators hold as free, of page 0, where padding goes, and of free request slots;
# with HURT, of the first page of a request that decodes, too.
NAN_IN_FREE_PAGES = """
import torch
from sglang.srt.mem_cache.allocator import swa
from sglang_dsv4.cache.regions import Kind, Part
allocators = []
made = swa.SWATokenToKVPoolAllocator.__init__
def remember(self, *args, **kwargs):
    made(self, *args, **kwargs)
    allocators.append(self)
swa.SWATokenToKVPoolAllocator.__init__ = remember
def free(pages):
    return torch.cat([pages.free_pages, pages.release_pages, torch.zeros(1)]).long()
def plant(self, batch):
    (allocator,) = allocators
    history, window = free(allocator.full_attn_allocator), free(allocator.swa_attn_allocator)
    if HURT and batch.forward_mode.is_decode():
        live = self._planner._req_to_token[batch.req_pool_indices[:1], 0].long() // 256
        history = torch.cat([history, live])
    slots = torch.ones(self._planner._req_to_token.shape[0], dtype=torch.bool)
    slots[batch.req_pool_indices.long()] = False
    slots[0] = False
    nan = float("nan")
    for layer in self.cache.layers:
        storage, ratio = layer.memory.storage, layer.ratio
        storage.pool[: layer.memory.storage.num_window_rows].unflatten(0, (-1, 256))[window] = nan
        for stored in storage.regions:
            if stored.region.kind is Kind.BOUNDARY:
                stored.tensor[window] = nan
        if ratio:
            storage.pool[layer.memory.storage.num_window_rows :].unflatten(0, (-1, 256 // ratio))[history] = nan
        if storage.tensor(Kind.INDEX_KEY, Part.INDEX) is not None:
            storage.tensor(Kind.INDEX_KEY, Part.INDEX).unflatten(0, (-1, 64))[history] = nan
    print(f"NaN in {len(history)} history pages and {len(window)} window pages", flush=True)
"""


@pytest.fixture(scope="module")
def oracle(tiny):
    return Oracle(tiny)


def stress(server, requests, seed=0, bound=None):
    """A checked run."""
    load = Load(seed, 0, requests, 0.0, concurrency=16)
    with Progress(disable=True) as progress:
        run = asyncio.run(session.stress(ServerTarget(server.url), load, progress, bound=bound))
    assert run.judge.verdict.answers >= requests // 2
    return run


def ask_long(server, number):
    """A request that takes much longer than the test lets its server live; whether the connection broke."""
    body = {"input_ids": prompt(40, salt=number), "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True}}
    try:
        httpx.post(f"{server.url}/generate", json=body, timeout=120)
    except httpx.TransportError:
        return True
    return False


def process_named(group, name):
    """A process of a server, by the name that SGLang gives it."""
    (found,) = [pid for pid in running_in(group) if name in psutil.Process(pid).cmdline()[0]]
    return found


# What is killed: all at once, as a container is; the process that was launched; the scheduler, the largest and so the
# one that the kernel takes when memory is short.
VICTIMS = ("all", "launched", "scheduler")


@pytest.mark.soak
def test_killed_ten_times_in_a_row_in_a_burst_and_started_again_on_its_port(warm, tiny):
    port, bound = free_port(), None
    for number in range(10):
        victim = VICTIMS[number % len(VICTIMS)]
        with serving(warm, tiny, SERVER, port=port) as server, ThreadPoolExecutor(24) as pool:
            run = stress(server, 12, seed=number, bound=bound)
            assert run.faults == [], victim
            bound = run.judge.bound
            asked = [pool.submit(ask_long, server, salt) for salt in range(24)]
            time.sleep(0.5 + 0.2 * number)
            if victim == "all":
                os.killpg(server.pid, signal.SIGKILL)
            elif victim == "launched":
                os.kill(server.pid, signal.SIGKILL)
            else:
                os.kill(process_named(server.pid, "scheduler"), signal.SIGKILL)
            assert all(one.result() for one in asked), victim
            # The others notice, and end by themselves: the port is free.
            wait_until_ended(server.pid)


def test_told_to_stop_during_a_prefill_it_answers_and_leaves_no_process(warm, tiny, oracle):
    with serving(warm, tiny, SERVER) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(generate, server, prompt(1600), new_tokens=3)
        wait_for_log(server, "#new-token: 512", times=2)
        os.kill(server.pid, signal.SIGTERM)
        wait_for_log(server, "SIGTERM received")
        assert not asked.done()
        check(oracle, prompt(1600), asked.result())
        wait_until_ended(server.pid)


def test_nan_in_free_pages_never_surfaces(warm, tiny):
    before = COPIES + "HURT = False\n" + NAN_IN_FREE_PAGES + BEFORE_STEPS
    with serving(warm, tiny, SERVER, before=before) as server:
        assert stress(server, 40).faults == []
        planted = [line.split() for line in server.log_lines() if line.startswith("NaN in ")]
    # In all kinds of moments: with most pages free, and with few.
    counts = [int(words[2]) for words in planted]
    assert min(counts) < 5 and max(counts) > 12 and len(planted) > 100


def test_the_same_nan_in_a_live_page_surfaces(warm, tiny):
    before = COPIES + "HURT = True\n" + NAN_IN_FREE_PAGES + BEFORE_STEPS
    with serving(warm, tiny, SERVER, before=before) as server:
        reply = post(server, "generate", request_body(prompt(30), 4)).json()
    values = [value for value, *_ in reply["meta_info"]["output_token_logprobs"]]
    # JSON has no NaN. The first token is the prefill's, before which nothing was planted.
    assert values[0] is not None and values[1:] == [None] * 3


def test_a_wrong_row_in_a_live_page_stops_a_server_that_checks_every_step(warm, tiny, tmp_path, capsys):
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
            httpx.post(f"{server.url}/generate", json=body, timeout=120)
        wait_until_ended(server.pid)
        (said,) = [line for line in server.log_lines() if "integrity check failed, the" in line]
        assert "I8 sums: request the-request: layer 1: entry 0 in history page " in said
    (dump,) = tmp_path.iterdir()
    assert str(dump) in said
    assert main(["inspect", str(dump)]) == 0
    shown = capsys.readouterr().out
    assert "the-request" in shown and "entry" in shown


def test_without_the_check_the_wrong_row_changes_the_answer(warm, tiny, oracle):
    """The twin: nobody stops, and what comes is wrong from there on."""
    with serving(warm, tiny, SERVER, before=COPIES + WRONG_ROW + BEFORE_STEPS) as server:
        tokens, logprobs, _ = generate(server, prompt(30), new_tokens=14)
        # A server that still answers: a request that never has 40 tokens is right.
        check(oracle, prompt(5), generate(server, prompt(5), new_tokens=4))
    sequence = prompt(30) + tokens[:-1]
    expected = oracle.logprobs(sequence)[29:]
    bound = comparison_bound(0.0, oracle.arithmetic_error(sequence).max().item())
    errors = (logprobs - expected).abs().amax(dim=1)
    # The log-probabilities behind the prompt are of token 30; the step that brings the length to 40 makes those of token 40.
    assert errors[:10].max().item() <= bound < errors[10:].max().item()
