"""The client: what it asks, what it makes of the replies, and in which order it sends."""

import json
import threading

import httpx
import pytest

from sglang_dsv4.check.demo.answers import read_answer
from sglang_dsv4.check.demo.client import Client
from sglang_dsv4.check.demo.workload import PlannedRequest

VOCAB = 5
REQUESTS = (
    PlannedRequest("second wave", (1, 2), wave=2),
    PlannedRequest("first", (3,), wave=1),
    PlannedRequest("also first", (4, 1, 2), wave=1),
)


def reply(prompt_ids: list[int], new_tokens: int) -> dict:
    """What SGLang replies: each log-probability as (value, token id, text)."""
    rows = [[[-0.5 - token - step, token, None] for token in range(VOCAB)] for step in range(new_tokens)]
    return {
        "text": "ok",
        "output_ids": [0] * new_tokens,
        "meta_info": {
            "prompt_tokens": len(prompt_ids),
            "cached_tokens": 0,
            "output_token_logprobs": [[row[0][0], 0, None] for row in rows],
            "output_token_ids_logprobs": rows,
        },
    }


class FakeServer(httpx.BaseTransport):
    """Answers like a server, and requires that the two requests of the first wave are there at once."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.together = threading.Barrier(2, timeout=10)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return httpx.Response(503)
        if request.url.path == "/server_info":
            return httpx.Response(200, json={"internal_states": [{"sglang_dsv4": {"version": "9"}}]})
        body = json.loads(request.read())
        if body["input_ids"] != [1, 2]:
            self.together.wait()
        self.bodies.append(body)
        return httpx.Response(200, json=reply(body["input_ids"], body["sampling_params"]["max_new_tokens"]))


def make_client(transport: httpx.BaseTransport) -> Client:
    return Client("http://server", VOCAB, transport)


def test_waves_are_sent_together_and_one_after_the_other():
    server, steps = FakeServer(), []
    answers = make_client(server).run(REQUESTS, 3, lambda: steps.append(1))
    assert [answer.name for answer in answers] == [request.name for request in REQUESTS]
    assert [answer.prompt_ids for answer in answers] == [request.prompt_ids for request in REQUESTS]
    assert server.bodies[-1]["input_ids"] == [1, 2]
    assert len(steps) == 3


def test_asks_greedily_for_every_logprob():
    server = FakeServer()
    answer = make_client(server).generate(REQUESTS[0], 3)
    (body,) = server.bodies
    assert body["sampling_params"] == {"temperature": 0.0, "max_new_tokens": 3, "ignore_eos": True}
    assert body["token_ids_logprob"] == list(range(VOCAB))
    assert body["return_logprob"] is True and body["logprob_start_len"] == -1
    assert answer.output_ids == (0, 0, 0)
    assert answer.logprobs.tolist() == [[-0.5 - token - step for token in range(VOCAB)] for step in range(3)]


def test_not_ready_is_not_healthy():
    assert not make_client(FakeServer()).is_healthy()
    assert make_client(httpx.MockTransport(lambda request: httpx.Response(200))).is_healthy()

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    assert not make_client(httpx.MockTransport(refuse)).is_healthy()


@pytest.mark.parametrize(
    ("info", "expected"),
    [({}, None), ({"internal_states": [{}]}, None), ({"internal_states": [{"sglang_dsv4": {"a": 1}}]}, {"a": 1})],
)
def test_plugin_facts(info: dict, expected: dict | None):
    client = make_client(httpx.MockTransport(lambda request: httpx.Response(200, json=info)))
    assert client.plugin_facts() == expected


def test_an_error_of_the_server_is_raised():
    client = make_client(httpx.MockTransport(lambda request: httpx.Response(500, json={})))
    with pytest.raises(httpx.HTTPStatusError):
        client.run(REQUESTS, 3, lambda: None)


def without(key: str) -> dict:
    broken = reply([1], 2)
    del broken["meta_info"][key]
    return broken


def with_rows(rows: list) -> dict:
    broken = reply([1], 2)
    broken["meta_info"]["output_token_ids_logprobs"] = rows
    return broken


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (without("cached_tokens"), "cached_tokens"),
        (without("output_token_ids_logprobs"), "output_token_ids_logprobs"),
        (with_rows([[[-1.0, 0, None]]]), "log-probabilities of 2 tokens, got 1"),
        (with_rows([[[-1.0, 0, None]], [[-1.0, 3, None]]]), "whole vocabulary"),
    ],
)
def test_an_incomplete_reply_is_named(broken: dict, message: str):
    with pytest.raises(ValueError, match=message):
        read_answer("one", (1,), broken, 0.0)
