"""A server that is killed with a request in flight, and started again on the same port, with fp8 rows."""

import httpx
import pytest

from sglang_dsv4.check.bound import comparison_bound
from sglang_dsv4.check.oracle import Oracle
from tests.plugin.serving import generate, prompt, request_body, serving

pytestmark = [pytest.mark.sglang, pytest.mark.long]

ARGUMENTS = ("--dtype", "float32", "--dsv4-kv-format", "fp8_584", "--chunked-prefill-size", "256", "--sleep-on-idle")


def test_a_killed_server_restarts_on_its_port(warm, tiny):
    """As a user starts them: in processes of their own, not in copies of one that has SGLang imported."""
    with serving(warm, tiny, ARGUMENTS, before="") as server:
        body = request_body(prompt(500, salt=6), 400)
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/generate", json=body, timeout=0.5)
    with serving(warm, tiny, ARGUMENTS, port=server.port, before="") as again:
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
