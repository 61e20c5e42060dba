"""The client and the replies it reads: what it asks, and what is incomplete."""

import asyncio
import json

import httpx
import pytest

from sglang_dsv4.check.client import Client
from sglang_dsv4.check.reply import check_scored, read_reply

TOP = [[[-0.5, 7, None], [-0.9, 8, None]], [[-0.2, 6, None], [-1.2, 8, None]]]


def raw_reply(**meta):
    """What SGLang replies: each log-probability as (value, token id, text)."""
    chosen = [[-0.5, 7, None], [-0.2, 6, None]]
    about = {"prompt_tokens": 2, "cached_tokens": 1, "output_token_logprobs": chosen, "output_top_logprobs": TOP}
    return {"text": "ok", "output_ids": [7, 6], "meta_info": {**about, **meta}}


def talk(use, handle):
    """What ``use`` makes of a client whose server is ``handle``, and the requests that it got."""
    requests = []

    def note(request):
        requests.append(request)
        return handle(request)

    async def run():
        async with Client("http://server", httpx.MockTransport(note)) as client:
            return await use(client)

    return asyncio.run(run()), requests


def test_asks_greedily_with_margins_and_not_for_the_prompt():
    def handle(request):
        return httpx.Response(200, json=raw_reply())

    reply, (request,) = talk(lambda client: client.generate((1, 2), 2, rid="r"), handle)
    body = json.loads(request.content)
    assert body["sampling_params"] == {"temperature": 0.0, "max_new_tokens": 2, "ignore_eos": True}
    assert (body["input_ids"], body["rid"], body["logprob_start_len"]) == ([1, 2], "r", -1)
    assert body["return_logprob"] is True and body["top_logprobs_num"] == 2
    assert (reply.token_ids, reply.text, reply.prompt_tokens, reply.cached_tokens) == ((7, 6), "ok", 2, 1)
    assert [token.margin for token in reply.tokens] == pytest.approx([0.4, 1.0])
    assert [token.best_id for token in reply.tokens] == [7, 6]


def test_scores_are_those_of_the_given_tokens():
    meta = {"input_token_logprobs": [[None, 2, None], [-0.5, 7, None]], "input_top_logprobs": [None, TOP[0]]}

    def handle(request):
        return httpx.Response(200, json={"meta_info": meta})

    (token,), (request,) = talk(lambda client: client.score((1, 2), (7,)), handle)
    body = json.loads(request.content)
    assert (body["input_ids"], body["logprob_start_len"]) == ([1, 2, 7], 1)
    assert token == (7, -0.5, 7, pytest.approx(0.4))
    with pytest.raises(ValueError, match=r"log-probabilities of \[6\], got \[7\]"):
        talk(lambda client: client.score((1, 2), (6,)), handle)


@pytest.mark.parametrize(
    ("info", "expected"),
    [({}, None), ({"internal_states": [{}]}, None), ({"internal_states": [{"sglang_dsv4": {"a": 1}}], "dtype": "x"}, "x")],
)
def test_plugin_facts(info, expected):
    def handle(request):
        return httpx.Response(200, json=info)

    if expected is None:
        with pytest.raises(ValueError, match="expected facts of sglang_dsv4"):
            talk(lambda client: client.plugin_facts(), handle)
    else:
        facts, _ = talk(lambda client: client.plugin_facts(), handle)
        assert (facts["a"], facts["dtype"], facts["model_path"]) == (1, expected, None)


def test_an_error_of_the_server_is_raised():
    for use in (lambda client: client.generate((1,), 2), lambda client: client.flush()):
        with pytest.raises(httpx.HTTPStatusError):
            talk(use, lambda request: httpx.Response(500, json={}))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"output_top_logprobs": None}, "two best log-probabilities of 2 tokens, got 0"),
        ({"output_top_logprobs": [TOP[0], TOP[1][:1]]}, "two best log-probabilities of 2 tokens, got 1"),
        ({"output_token_ids_logprobs": [[[-1.0, 0, None]]]}, "log-probabilities of 2 tokens, got 1"),
        ({"output_token_ids_logprobs": [[[-1.0, 0, None]], [[-1.0, 3, None]]]}, "whole vocabulary"),
    ],
)
def test_an_incomplete_reply_is_named(meta, message):
    assert check_scored(read_reply(raw_reply()), 2).tokens
    with pytest.raises(ValueError, match=message):
        check_scored(read_reply(raw_reply(**meta)), 2)
    with pytest.raises(ValueError, match="of 3 tokens"):
        check_scored(read_reply(raw_reply()), 3)
    with pytest.raises(KeyError, match="cached_tokens"):
        read_reply({"output_ids": [], "text": "", "meta_info": {"prompt_tokens": 1}})


@pytest.mark.parametrize("retractions", [0, 1])
def test_tokens_are_whole_where_a_retraction_lost_a_log_probability(retractions):
    """The list of a retracted request may begin one late. Without a retraction that is a fault, and stays one."""
    raw = raw_reply(num_retractions=retractions) | {"output_ids": [5, 7, 6]}
    reply = read_reply(raw)
    lost = ((5, None),) if retractions else ()
    assert tuple((token.token_id, token.logprob) for token in reply.tokens) == (*lost, (7, -0.5), (6, -0.2))


def test_a_retraction_excuses_no_other_loss():
    assert read_reply(raw_reply(num_retractions=1) | {"output_ids": [7, 5, 6]}).token_ids == (7, 6)
