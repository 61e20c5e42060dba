"""A real SGLang server over our cache, on a CPU, with every unwritten byte of the cache set to NaN.

One server, with exact rows so that the comparison is sharp, and a pool of 14 pages, which ten requests at once outgrow.
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from sglang_dsv4 import env
from sglang_dsv4.cache.sizing import ServerSize, size_of
from sglang_dsv4.check.bound import comparison_bound
from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.check.server import active_line
from sglang_dsv4.plugin.install import versions
from sglang_dsv4.spec import CacheSpec
from tests.plugin.serving import NEW_TOKENS, generate, post, prompt, read, request_body, serving

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

# At admission a page each, and two for those above 256; a page more as soon as one crosses 256.
LENGTHS = [1, 2, 3, 7, 127, 131, 253, 254, 255, 257, 259, 515]
OUR_LABELS = ("pool", "state", "ratio", "cause")
SMALL_POOL = ("--max-total-tokens", "3584", "--swa-full-tokens-ratio", "1.0", "--schedule-conservativeness", "0.01")


def empty_cache(server):
    """Wait until no request is left, and forget all prefixes: SGLang does the second only after the first."""
    post(server, "flush_cache?timeout=60", {})


def facts_of(server):
    info = httpx.get(f"{server.url}/server_info", timeout=60).json()
    return info["internal_states"][0]["sglang_dsv4"]


def metrics_of(server):
    """Samples of our metrics, by name and labels of ours."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.name.startswith("sglang_dsv4_"):
                ours = [sample.labels[name] for name in OUR_LABELS if name in sample.labels]
                samples[(sample.name, *ours)] = sample.value
    return samples


def moved(server, before):
    """Counters that moved since, and by how much."""
    now = metrics_of(server)
    changes = {key: value - before[key] for key, value in now.items() if "_total" in key[0]}
    return {key: value for key, value in changes.items() if value}


@pytest.fixture(scope="module")
def oracle(tiny):
    return Oracle(tiny)


@pytest.fixture(scope="module")
def server(warm, tiny):
    """Exact rows, small pool, prefill mixed with decode, poisoned memory, metrics, integrity checks."""
    # Beside a decoding request, a chunk of 512 has room for one page of prefill.
    arguments = (
        "--dtype",
        "float32",
        "--dsv4-kv-format",
        "fp32",
        *SMALL_POOL,
        "--chunked-prefill-size",
        "512",
        "--enable-mixed-chunk",
        "--sleep-on-idle",
        "--enable-metrics",
        "--dsv4-check",
        "boundary",
    )
    with serving(warm, tiny, arguments, variables={env.POISON: "1"}) as running:
        yield running


def check(oracle, input_ids, answer):
    """Every log-probability of every generated position, against transformers' full forward."""
    tokens, logprobs, _ = answer
    sequence = input_ids + tokens[:-1]
    expected = oracle.logprobs(sequence)[len(input_ids) - 1 :]
    bound = comparison_bound(0.0, oracle.arithmetic_error(sequence).max().item())
    assert logprobs.shape == expected.shape
    error = (logprobs - expected).abs().max().item()
    assert error <= bound
    best, second = expected.topk(2, dim=1).values.unbind(dim=1)
    certain = (best - second) > bound
    assert (torch.tensor(tokens) == expected.argmax(dim=1))[certain].all()
    return bound


@pytest.mark.long
def test_answers_of_concurrent_requests_match_transformers_under_retraction(server, oracle):
    prompts = [prompt(length) for length in LENGTHS]
    answers = post(server, "generate", request_body(prompts, NEW_TOKENS)).json()
    for input_ids, answer in zip(prompts, answers, strict=True):
        bound = check(oracle, input_ids, read(answer))
    # The pool was full, requests were sent back to the queue, and their answers are as right.
    assert any("KV cache pool is full. Retract requests" in line for line in server.log_lines())
    assert max(answer["meta_info"]["num_retractions"] for answer in answers) > 0
    # The twin: the same answer judged as if one token of the prompt had been another one.
    wrong = [*prompts[-1][:300], prompts[-1][300] ^ 1, *prompts[-1][301:]]
    tokens, logprobs, _ = read(answers[-1])
    moved = oracle.logprobs(wrong + tokens[:-1])[len(wrong) - 1 :]
    assert (logprobs - moved).abs().max().item() > bound


def test_concurrent_requests_of_many_clients(server, oracle):
    """The same prompts again, each from a client of its own, in the order in which they arrive."""
    empty_cache(server)
    prompts = [prompt(length) for length in LENGTHS]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda ids: generate(server, ids), prompts))
    for input_ids, answer in zip(prompts, answers, strict=True):
        check(oracle, input_ids, answer)


@pytest.mark.parametrize("length", [257, 259, 515])
def test_a_prefix_hit_is_as_right_as_a_cold_run(server, oracle, length):
    empty_cache(server)
    input_ids = prompt(length)
    cold, hit = generate(server, input_ids), generate(server, input_ids)
    assert cold[2] < 256 <= hit[2] < length
    check(oracle, input_ids, cold)
    check(oracle, input_ids, hit)
    longer = input_ids[: length - 1] + prompt(37, salt=4)
    answer = generate(server, longer)
    assert answer[2] >= 256
    check(oracle, longer, answer)


def test_a_prompt_prefilled_in_chunks_beside_a_decoding_request(server, oracle):
    """SGLang mixes the two in one batch only where nobody asks for log-probabilities; so the tokens are compared."""

    def plain(input_ids, new_tokens, **options):
        body = request_body(input_ids, new_tokens)
        return {"input_ids": input_ids, "sampling_params": body["sampling_params"], **options}

    empty_cache(server)
    before = facts_of(server)["steps"].get("mixed", 0)
    decoding, long = prompt(30, salt=11), prompt(700, salt=12)
    body = plain(decoding, 40, stream=True)
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
        next(lines)  # it is decoding
        beside = post(server, "generate", plain(long, NEW_TOKENS)).json()
        (*_, last) = lines
    assert facts_of(server)["steps"]["mixed"] > before
    right = 0
    for input_ids, answer in ((decoding, json.loads(last[6:])), (long, beside)):
        tokens = answer["output_ids"]
        sequence = input_ids + tokens[:-1]
        expected = oracle.logprobs(sequence)[len(input_ids) - 1 :]
        bound = comparison_bound(0.0, oracle.arithmetic_error(sequence).max().item())
        best, second = expected.topk(2, dim=1).values.unbind(dim=1)
        certain = (best - second) > bound
        assert (torch.tensor(tokens) == expected.argmax(dim=1))[certain].all()
        right += int(certain.sum())
        # The twin: one token of the prompt another one, and some certain token is.
        wrong = [sequence[0] ^ 1, *sequence[1:]] if len(input_ids) < 128 else sequence[4:]
        moved = oracle.logprobs(wrong)[-len(tokens) :].argmax(dim=1)
        assert (moved != expected.argmax(dim=1))[certain].any()
    assert right > 40


def test_a_short_prompt_in_a_slot_that_held_a_long_one(server, oracle):
    for length in (380, 3, 1):
        input_ids = prompt(length, salt=5)
        check(oracle, input_ids, generate(server, input_ids, new_tokens=12))


@pytest.mark.parametrize("way", ["leaves", "aborts"])
def test_a_client_that_leaves_or_aborts_does_not_harm_others(server, oracle, way):
    gone, began = prompt(500, salt=6), threading.Event()

    def stop():
        body = {**request_body(gone, 2000), "stream": True, "rid": way}
        with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120) as stream:
            lines = stream.iter_lines()
            next(lines)
            began.set()
            if way == "aborts":
                post(server, "abort_request", {"rid": way})
                (*_, last) = (line for line in lines if line.startswith("data: {"))
                reason = json.loads(last[6:])["meta_info"]["finish_reason"]
                assert reason["type"] == "abort"

    input_ids = prompt(300, salt=7)
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(stop)
        began.wait()
        check(oracle, input_ids, generate(server, input_ids))
        stopping.result()
    empty_cache(server)  # which waits for the request to be gone, and not for its 2,000 tokens
    check(oracle, input_ids, generate(server, input_ids))


def test_token_ids_outside_the_vocabulary_are_refused_and_the_server_lives(server, oracle):
    for bad in ([5, 100000], [-1, 5]):
        body = {"input_ids": bad, "sampling_params": {"max_new_tokens": 2}}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
        assert answer.status_code == 400
        assert "input_ids: expected ids of 0 .. 263" in answer.text
    input_ids = prompt(5, salt=8)
    check(oracle, input_ids, generate(server, input_ids))


def test_chat_and_sampling(server):
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "héllo 你好"}],
        "max_tokens": 5,
        "temperature": 0.8,
        "seed": 1,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 5


def test_the_server_proves_that_our_cache_runs(server, tiny):
    line = active_line(server.log_lines())
    assert line is not None and "rows fp32" in line and "attention eager on cpu" in line
    assert "kernels torch, index scores torch" in line
    info = httpx.get(f"{server.url}/server_info", timeout=60).json()["internal_states"][0]
    facts = info["sglang_dsv4"]
    report = facts["report"]
    assert facts["cache"] == "CompressedKVCache"
    assert report["total_bytes"] == sum(report["bytes_by_pool"].values())
    # SGLang's own figure, rounded by it to 1 MiB, is ours.
    assert info["memory_usage"]["kvcache"] == pytest.approx(report["total_bytes"] / 2**30, abs=1e-3)
    assert info["memory_usage"]["token_capacity"] == report["max_tokens"]
    # And what `python -m sglang_dsv4 size` says of a server with these options.
    config = json.loads((tiny / "config.json").read_text())
    spec = CacheSpec.from_hf(config, row_format="fp32", index_format="fp32")
    size = ServerSize(3584, requests=16, window_share=1.0)
    assert size_of(spec, size) == report["total_bytes"]


def test_metrics_move_by_what_the_schedule_says(server):
    """Two layers of ratio 4, two of 128; a prompt of 515 tokens in chunks of 512, then eight steps that decode for the tokens of
    the answer, and in SGLang's older version one more, because its overlapped scheduler notices the end a step late."""
    late = versions.installed() is versions.SERVED[0]
    empty_cache(server)
    input_ids, start = prompt(515, salt=21), metrics_of(server)
    generate(server, input_ids)
    # 523 tokens are stored, or 524: 130 blocks of 4, closed by the first chunk and after 516 and 520 tokens, or one more, and 4
    # of 128.
    assert moved(server, start) == {
        ("sglang_dsv4_entries_written_total", "4"): 2 * (130 + late),
        ("sglang_dsv4_entries_written_total", "128"): 2 * 4,
        ("sglang_dsv4_flushes_total", "4"): 3 + late,
        ("sglang_dsv4_flushes_total", "128"): 1,
        ("sglang_dsv4_boundary_states_restored_total", "chunk"): 1,
        ("sglang_dsv4_integrity_checks_total",): 1,
    }
    cold = metrics_of(server)
    generate(server, input_ids)
    assert moved(server, cold) == {
        ("sglang_dsv4_entries_written_total", "4"): 2 * (2 + late),
        ("sglang_dsv4_flushes_total", "4"): 2 + late,
        ("sglang_dsv4_prefix_tokens_total",): 512,
        ("sglang_dsv4_boundary_states_restored_total", "prefix_hit"): 1,
        ("sglang_dsv4_integrity_checks_total",): 1,
    }


def test_metrics_say_who_holds_the_pages(server):
    def held(pool, samples):
        states = ("free", "cached", "shared", "private")
        return tuple(int(samples["sglang_dsv4_pages", pool, state]) for state in states)

    empty_cache(server)
    input_ids = prompt(515, salt=22)
    generate(server, input_ids)
    body = {**request_body(input_ids, 200), "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120) as stream:
        lines = stream.iter_lines()
        next(lines)
        decoding = metrics_of(server)
        list(lines)
    # Its 512 tokens from the prefix cache, and a page of its own, of which it has begun the first.
    assert held("history", decoding) == (11, 0, 2, 1)
    assert sum(held("window", decoding)) == 14
    assert 0 < decoding["sglang_dsv4_tail_tokens", "128"] < 128
    empty_cache(server)
    idle = metrics_of(server)
    assert held("history", idle) == held("window", idle) == (14, 0, 0, 0)
    assert idle["sglang_dsv4_tail_tokens", "128"] == idle["sglang_dsv4_request_slots", "used"] == 0
    sizes = facts_of(server)["report"]["bytes_by_pool"]
    assert sizes == {key[1]: value for key, value in idle.items() if "pool_bytes" in key[0]}
