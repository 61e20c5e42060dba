"""Requests to a server of the tests, and their answers."""

import time

import httpx
import torch

from sglang_dsv4.demo.client import Client

NEW_TOKENS = 9
START_S = 240


def prompt(length, salt=0):
    generator = torch.Generator().manual_seed(1000 * salt + length)
    return torch.randint(8, 264, (length,), generator=generator).tolist()


def wait_until_ready(server, check_alive):
    """Wait for a server to take requests; ``check_alive`` raises once it never will."""
    client = Client(server.url, 264)
    deadline = time.monotonic() + START_S
    while not client.is_healthy():
        check_alive()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    client.close()


def request_body(input_ids, new_tokens):
    """Every request asks for the same kind of log-probabilities: SGLang 0.5.17's scheduler ends the server when one
    decode batch mixes requests with and without ``token_ids_logprob``."""
    return {
        "input_ids": input_ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        "return_logprob": True,
        "token_ids_logprob": list(range(264)),
    }


def generate(server, input_ids, new_tokens=NEW_TOKENS):
    answer = post(server, "generate", request_body(input_ids, new_tokens))
    return read(answer.json())


def post(server, path, body):
    answer = httpx.post(f"{server.url}/{path}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer


def read(answer):
    """The generated tokens, the log-probabilities behind each, and the prompt tokens that came from the prefix cache."""
    meta = answer["meta_info"]
    tokens = [token for _, token, _ in meta["output_token_logprobs"]]
    rows = [[value for value, _, _ in row] for row in meta["output_token_ids_logprobs"]]
    return tokens, torch.tensor(rows), meta["cached_tokens"]
