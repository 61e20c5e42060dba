"""The runtime's answers are transformers': for every length, chunk size, batch, dtype and row format."""

import pytest
import torch

from sglang_dsv4.check.bound import comparison_bound
from sglang_dsv4.check.faults import DroppedBStream
from sglang_dsv4.runtime.sampling import Sampler
from sglang_dsv4.tiny.tokenizer import EOS_ID
from tests.runtime.worlds import (
    assert_greedy,
    assert_nothing_held,
    assert_right,
    bound,
    logprobs_behind,
    make_runtime,
    make_tokens,
)

LENGTHS = [1, 3, 4, 5, 127, 128, 129, 132, 255, 256, 257, 261]


@pytest.fixture(scope="module")
def runtime(small_checkpoint):
    return make_runtime(small_checkpoint, debug=True)


@pytest.fixture(scope="module")
def deep_runtime(checkpoint):
    """Of five layers: what one compressing layer stores depends on what another attended to."""
    return make_runtime(checkpoint, debug=True)


@pytest.mark.parametrize("length", [5, 261])
def test_layers_upon_layers(deep_runtime, oracle, length):
    with deep_runtime.open(make_tokens(length)) as handle:
        assert_right(oracle, handle)
        done = handle.generate(4, stop=())
        assert_greedy(oracle, make_tokens(length), done.tokens)


@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_and_greedy_tokens(runtime, small_oracle, length):
    oracle, prompt = small_oracle, make_tokens(length)
    with runtime.open(prompt) as handle:
        done = handle.generate(6, stop=())
        assert handle.tokens == (*prompt, *done.tokens) and handle.seq_len == length + 6
        assert_greedy(oracle, prompt, done.tokens)
        assert_right(oracle, handle)


def test_one_wrong_entry_is_noticed(deep_runtime, oracle):
    """The twin: what a lost b-stream would give is beyond the bound."""
    prompt = make_tokens(261)
    with deep_runtime.open(prompt) as handle:
        wrong = oracle.logprobs(prompt, fault=DroppedBStream(64))[-1]
        assert (logprobs_behind(handle) - wrong).abs().max().item() > bound(oracle, prompt)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 128, 1000])
def test_chunk_sizes(small_checkpoint, small_oracle, chunk_tokens):
    runtime = make_runtime(small_checkpoint, chunk_tokens=chunk_tokens, max_ends=0)
    handle = runtime.open(make_tokens(140))
    assert_right(small_oracle, handle)


@pytest.mark.parametrize("max_requests", [2, 8])
def test_batch_of_different_lengths(small_checkpoint, small_oracle, max_requests):
    """Fewer slots than prompts: the others join as slots become free."""
    runtime = make_runtime(small_checkpoint, max_requests=max_requests, chunk_tokens=100, debug=True)
    prompts = [make_tokens(length, salt=1) for length in (1, 130, 4, 127, 261, 3)]
    for prompt, done in zip(prompts, runtime.generate(prompts, 5, stop=()), strict=True):
        assert len(done.tokens) == 5 and done.finish == "length"
        assert_greedy(small_oracle, prompt, done.tokens)
    assert_nothing_held(runtime)


def test_handles_and_prompts_in_one_batch(runtime, small_oracle):
    left, right = runtime.open(make_tokens(20, salt=2)), runtime.open(make_tokens(126, salt=2))
    before = [left.tokens, right.tokens, make_tokens(9, salt=2)]
    done = runtime.generate([left, right, before[2]], 4, stop=())
    for tokens, completion in zip(before, done, strict=True):
        assert_greedy(small_oracle, tokens, completion.tokens)
    assert left.tokens == before[0] + done[0].tokens and right.seq_len == 130
    with pytest.raises(ValueError, match="expected each handle once"):
        runtime.generate([left, left], 1)
    left.close()
    right.close()


@pytest.mark.parametrize(("dtype", "row_format"), [("float32", "bf16"), ("bfloat16", "bf16"), ("float32", "fp8_584")])
def test_dtypes_and_row_formats(checkpoint, oracle, dtype, row_format):
    """As far from exact as the same rounding in transformers puts it, twice at most."""
    runtime = make_runtime(checkpoint, dtype=dtype, row_format=row_format)
    for length in (5, 261):
        prompt = make_tokens(length, salt=3)
        rounding = oracle.rounding_error(prompt, getattr(torch, dtype), row_format).max().item()
        arithmetic = oracle.arithmetic_error(prompt).max().item()
        with runtime.open(prompt) as handle:
            error = (logprobs_behind(handle) - oracle.logprobs(prompt)[-1]).abs().max().item()
        assert error <= comparison_bound(rounding, arithmetic)


def test_a_seed_draws_the_same_tokens_alone_and_in_a_batch(runtime):
    prompts = [make_tokens(30, salt=4), make_tokens(40, salt=4)]
    options = {"temperature": 1.0, "stop": ()}
    batch = runtime.generate(prompts, 8, seed=5, **options)
    alone = [runtime.generate([p], 8, seed=5 + i, **options)[0] for i, p in enumerate(prompts)]
    assert [done.tokens for done in batch] == [done.tokens for done in alone]
    other = runtime.generate(prompts, 8, seed=6, **options)
    assert other[0].tokens != batch[0].tokens


def test_the_sampler_draws_by_probability():
    """Within five standard deviations; at another temperature not."""
    logits, draws = torch.tensor([0.0, 1.0, 2.0]), 4000

    def worst(temperature):
        sampler = Sampler(0.5, seed=0)
        counts = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(draws)]), minlength=3)
        p = (logits / temperature).softmax(dim=0)
        return ((counts - draws * p) / (draws * p * (1 - p)).sqrt()).abs().max().item()

    assert worst(0.5) < 5 < worst(0.6)
    for temperature in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature: expected a number of 0 or more"):
            Sampler(temperature, None)


def test_stops(runtime):
    with runtime.open(make_tokens(50, salt=5)) as handle:
        free = handle.fork().generate(12, stop=())
        third = free.tokens[2]
        first = free.tokens.index(third)
        done = handle.fork().generate(12, stop=third)
        assert done.tokens == free.tokens[: first + 1] and done.finish == "stop"
        assert done.text == runtime.text.decode(done.tokens[:-1])
        text = free.text[4:6]
        done = handle.fork().generate(12, stop=["never there", text])
        assert done.finish == "stop" and done.text == free.text[: free.text.find(text)]
        for wrong in ([""], [1.5], [True], True):
            with pytest.raises(ValueError, match="stop: expected texts and token ids"):
                handle.generate(1, stop=wrong)


def test_the_end_token_stops_unless_told_otherwise(runtime, monkeypatch):
    monkeypatch.setattr(Sampler, "choose", lambda self, logits: EOS_ID)
    with runtime.open("abc") as handle:
        done = handle.generate(5)
        assert done.tokens == (EOS_ID,) and done.finish == "stop" and done.text == ""
        assert handle.generate(5, stop=()).tokens == (EOS_ID,) * 5


def test_streamed_pieces_are_the_text(runtime, capsys):
    pieces = []
    with runtime.open("The history of tea begins", stream=pieces.append) as handle:
        done = handle.generate(40, temperature=2.0, seed=0, stop=())
        assert "".join(pieces) == done.text and len(pieces) > 5
        shown = handle.generate(3, stop=(), stream=True)
        assert capsys.readouterr().out == shown.text


def test_text_of_many_bytes_comes_in_whole_characters(runtime):
    from sglang_dsv4.runtime.text import TextStream

    text = "Tee, 茶, чай, ☕ und 🍵!"
    stream = TextStream(runtime.text)
    pieces = [stream.take(token) for token in runtime.text.encode(text)] + [stream.rest()]
    assert "".join(pieces) == text and "茶" in pieces and "🍵" in pieces
    broken = runtime.text.encode("茶")[:2]
    assert [stream.take(token) for token in broken] == ["", ""]
    assert stream.rest() == runtime.text.decode(broken)
