"""Batches that do not fit, and calls that are interrupted."""

import os
import signal

import pytest

from sglang_dsv4.errors import OutOfPagesError
from sglang_dsv4.runtime.interrupt import held_interrupts
from tests.runtime.worlds import assert_greedy, assert_nothing_held, assert_right, make_runtime, make_tokens


@pytest.mark.parametrize("num_pages", [3, 7])
def test_prompts_that_do_not_fit_together_take_turns(small_checkpoint, small_oracle, num_pages):
    runtime = make_runtime(small_checkpoint, num_pages=num_pages, debug=True)
    prompts = [make_tokens(length) for length in (250, 122, 130, 251, 20)]
    done = runtime.generate(prompts, 8, stop=())
    for prompt, completion in zip(prompts, done, strict=True):
        assert len(completion.tokens) == 8
        assert_greedy(small_oracle, prompt, completion.tokens)
    assert_nothing_held(runtime)


def test_beside_handles_they_take_turns_too(small_checkpoint, small_oracle):
    runtime = make_runtime(small_checkpoint, num_pages=5, debug=True)
    handle = runtime.open(make_tokens(250))
    before = handle.tokens
    prompts = [make_tokens(length, salt=1) for length in (120, 125)]
    done = runtime.generate([*prompts, handle], 12, stop=())
    for tokens, completion in zip([*prompts, before], done, strict=True):
        assert_greedy(small_oracle, tokens, completion.tokens)
    handle.close()
    assert_nothing_held(runtime)


def test_a_prompt_that_does_not_fit_alone(small_checkpoint):
    runtime = make_runtime(small_checkpoint, num_pages=3, debug=True)
    with pytest.raises(OutOfPagesError, match="does not fit beside what is held: .* free, got 0 of 3"):
        runtime.generate([make_tokens(380), make_tokens(20)], 20, stop=())
    with pytest.raises(OutOfPagesError, match="400 more tokens need 4 history pages"):
        runtime.open(make_tokens(400))
    assert_nothing_held(runtime)


def test_handles_that_do_not_fit_together(small_checkpoint):
    runtime = make_runtime(small_checkpoint, num_pages=4, debug=True)
    handles = [runtime.open(make_tokens(120, salt=s)) for s in range(2)]
    with pytest.raises(OutOfPagesError, match="400 more tokens need 4 history pages"):
        runtime.generate(handles, 200)
    assert [handle.seq_len for handle in handles] == [120, 120]


@pytest.mark.parametrize("after", [1, 4])
def test_interrupted_between_steps(small_checkpoint, small_oracle, after):
    """The stop button: what was computed stays, prompts are closed, and everything goes on."""
    runtime = make_runtime(small_checkpoint, debug=True)
    handle = runtime.open(make_tokens(130))
    pieces = []

    def stop(piece):
        pieces.append(piece)
        if len(pieces) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runtime.generate([handle, make_tokens(9)], 20, stop=(), sink=stop)
    assert 130 <= handle.seq_len <= 130 + after
    assert len(runtime.report().cache.requests) == 1
    handle.generate(2, stop=())
    assert_right(small_oracle, handle)
    handle.close()
    assert_nothing_held(runtime)


@pytest.mark.parametrize("length", [20, 128])
@pytest.mark.parametrize("steps", [1, 2])
def test_interrupted_while_appending(small_checkpoint, small_oracle, monkeypatch, length, steps):
    runtime = make_runtime(small_checkpoint, debug=True, chunk_tokens=50)
    handle = runtime.open(make_tokens(length)).truncate(length - 3)
    run, calls = runtime.engine.model.run, []

    def run_and_signal(plan, tokens):
        calls.append(len(tokens))
        if len(calls) == steps:
            os.kill(os.getpid(), signal.SIGINT)  # inside the step
        return run(plan, tokens)

    monkeypatch.setattr(runtime.engine.model, "run", run_and_signal)
    more = make_tokens(300, salt=1)
    with pytest.raises(KeyboardInterrupt):
        handle.append(more)
    assert list(handle.tokens) == [*make_tokens(length)[: length - 3], *more][: handle.seq_len]
    assert sum(calls) - 1 == handle.seq_len - (length - 3)
    handle.generate(2, stop=())
    assert_right(small_oracle, handle)
    handle.close()
    assert_nothing_held(runtime)


def test_an_interrupt_waits_for_the_end_of_the_block():
    reached = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), held_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(True)
    assert reached == [True] and signal.getsignal(signal.SIGINT) is before
