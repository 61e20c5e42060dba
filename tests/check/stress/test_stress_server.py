"""The stress test against a real tiny server, and what happens to one that is hurt."""

import asyncio
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from rich.progress import Progress

from sglang_dsv4.check.client import GENERATE, Client
from sglang_dsv4.check.stress import session
from sglang_dsv4.check.stress.cases import Case
from sglang_dsv4.check.stress.command import TINY_SERVER
from sglang_dsv4.check.stress.judging import Judge
from sglang_dsv4.check.stress.load import Load
from sglang_dsv4.check.stress.replies import Outcome, read_stream
from sglang_dsv4.check.stress.replies import request_body as request_body_of
from sglang_dsv4.check.stress.server_target import ServerTarget
from tests.plugin.serving import post, prompt, request_body, serving, wait_for_log

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.long]

ARGUMENTS = (*TINY_SERVER, "--sleep-on-idle")
PAGES = 60
RETRACTED = "Retract requests"


def stress(server, requests=40, seed=3):
    load = Load(seed, 0, requests, 0.0, concurrency=8)
    with Progress(disable=True) as progress:
        return asyncio.run(session.stress(ServerTarget(server.url), load, progress))


@pytest.fixture(scope="module")
def server(warm, tiny):
    with serving(warm, tiny, ARGUMENTS) as running:
        yield running


def test_a_short_run_is_right(server):
    run = stress(server)
    assert run.faults == []
    assert run.judge.verdict.answers > 35 and run.judge.verdict.largest <= run.judge.bound < 1e-2
    assert run.control and run.end["usage"]["history_pages"]["total"] == PAGES


def test_one_request_larger_than_the_cache_is_refused_and_the_server_lives(server):
    body = request_body(prompt(PAGES * 256 + 300, salt=2), 4)
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=120)
    assert 400 <= reply.status_code < 500, reply.text
    assert "longer than" in reply.text or "exceeds" in reply.text
    assert stress(server, requests=12, seed=4).faults == []


def test_a_slow_client_gets_all_and_holds_up_nobody(server):
    """It reads nothing until more was made than lies in buffers, and its pages are given back before it reads on."""
    input_ids, new_tokens = prompt(20, salt=3), 120
    body = request_body(input_ids, new_tokens)
    del body["token_ids_logprob"]
    alone = post(server, "generate", body).json()["output_ids"]
    transport = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)])
    body |= {"stream": True, "top_logprobs_num": 128}
    with (
        httpx.Client(transport=transport, trust_env=False, timeout=240) as slow,
        slow.stream("POST", f"{server.url}/generate", json=body) as stream,
    ):
        lines = (line for line in stream.iter_lines() if line.startswith("data: "))
        next(lines)
        beside = {**request_body(prompt(9, salt=5), 9), "top_logprobs_num": 2}
        del beside["token_ids_logprob"]
        assert len(post(server, "generate", beside).json()["output_ids"]) == 9
        deadline = time.monotonic() + 240
        while used(server):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        *events, last, done = lines
    assert done == "data: [DONE]"
    # The server could not send, and then sent several tokens together.
    assert len(events) + 2 < new_tokens
    last = json.loads(last.removeprefix("data: "))
    assert last["output_ids"] == alone and last["meta_info"]["finish_reason"]["type"] == "length"
    assert len(last["meta_info"]["output_top_logprobs"]) == new_tokens


def used(server):
    """Request slots in use."""
    info = httpx.get(f"{server.url}/server_info", timeout=60).json()["internal_states"][0]
    return info["sglang_dsv4"]["usage"]["request_slots"]["used"]


def test_a_server_elsewhere_is_judged_by_its_own_rounding(server, monkeypatch):
    """As if its checkpoint were not a folder of this machine."""
    monkeypatch.setattr(session, "_checkpoint_of", lambda facts: None)
    run = stress(server, requests=24, seed=6)
    assert run.faults == [] and run.bound_origin == "by the server's own rounding"
    assert 0 < run.judge.verdict.largest <= run.judge.bound < 1e-2
    assert {"resident_bytes", "device_bytes"} <= run.end["memory"].keys()


@pytest.fixture(scope="module")
def small_server(warm, tiny):
    """Sixteen pages."""
    small = ("--max-total-tokens", "4096", "--swa-full-tokens-ratio", "1.0")
    with serving(warm, tiny, (*ARGUMENTS, *small)) as running:
        yield running


@pytest.mark.soak
def test_a_request_retracted_before_its_first_token_came_is_whole(small_server):
    """Prompts of exactly a page need another for their first token: some are sent back just behind their prefill."""
    prompts = tuple(tuple(prompt(256, salt=number)) for number in range(16))
    burst = Case(0, "burst", GENERATE, prompts, new_tokens=6)

    async def ask(url):
        target = ServerTarget(url)
        checker = Judge(target.ask, target.tokenize, bound=1e-3)
        lost = 0
        try:
            for _ in range(5):  # which are sent back depends on which came first
                outcome = await target.send(burst)
                assert sum(answer.retractions for answer in outcome.answers) > 0
                assert await checker.add(outcome) == []
                lost += sum(answer.tokens[0].logprob is None for answer in outcome.answers)
        finally:
            await target.close()
        return lost

    # Should SGLang lose none any more, the client need not know of it.
    assert asyncio.run(ask(small_server.url)) > 0


@pytest.mark.soak
def test_a_retracted_request_that_is_aborted_while_it_waits_is_right(small_server):
    """They outgrow the cache; all are aborted when the first was sent back."""
    cases = [
        Case(at, "abort", GENERATE, (tuple(prompt(250, salt=at)),), new_tokens=600, stream=True, leave_after=1, abort=True)
        for at in range(16)
    ]
    seen = sum(RETRACTED in line for line in small_server.log_lines())

    async def follow(client, case):
        async with client.stream(GENERATE, request_body_of(case, f"waiting-{case.number}")) as (_, events):
            return [event async for event in events if event is not None]

    async def run():
        async with Client(small_server.url) as client:
            streams = [asyncio.create_task(follow(client, case)) for case in cases]
            await asyncio.to_thread(wait_for_log, small_server, RETRACTED, times=seen + 1)
            await client.send("/abort_request", {"rid": "", "abort_all": True})
            replies = await asyncio.gather(*streams)
        target = ServerTarget(small_server.url)
        checker = Judge(target.ask, target.tokenize, bound=1e-3)
        try:
            for case, events in zip(cases, replies, strict=True):
                answers, faults = read_stream(case, events, is_done=True)
                assert faults == [] and answers[0].finish == "abort"
                asked = replace(case, new_tokens=max(1, len(answers[0].token_ids)))
                assert await checker.add(Outcome(asked, 200, answers)) == []
        finally:
            await target.close()
        return [events[-1]["meta_info"] for events in replies if len(events) > 1]

    # Should SGLang give the counts one day, the client need not know of it.
    assert any("prompt_tokens" not in meta for meta in asyncio.run(run()))


def test_a_server_that_dies_is_reported_as_such(warm, tiny):
    with ThreadPoolExecutor(1) as pool, serving(warm, tiny, ARGUMENTS) as server:
        stressed = pool.submit(stress, server, requests=2000)
        wait_for_log(server, "POST /generate", times=10)
        os.killpg(server.pid, signal.SIGKILL)
        with pytest.raises(ConnectionError, match="the server stopped answering: "):
            stressed.result(timeout=120)


def test_a_load_that_is_ended_early_is_judged(server):
    asked = []

    def is_stopped():
        asked.append(None)
        return len(asked) > 8

    load = Load(3, 0, 2000, 0.0, concurrency=4)
    with Progress(disable=True) as progress:
        run = asyncio.run(session.stress(ServerTarget(server.url), load, progress, bound=1e-3, is_stopped=is_stopped))
    assert run.faults == [] and len(run.outcomes) == 8
