"""Fork, roll back, hold on to and close sequences of a runtime."""

import gc
import hashlib

import pytest
import torch

from sglang_dsv4.errors import OutOfPagesError, TruncateError, UnknownRequestError
from tests.cache.driver import reachable_bytes
from tests.runtime.worlds import assert_nothing_held, assert_right, logprobs_behind, make_runtime, make_tokens

DRAFT = 8


@pytest.fixture
def runtime(small_checkpoint):
    return make_runtime(small_checkpoint, debug=True)


def fingerprint(runtime, handle):
    """Every byte that a query could read, and the logits behind the last token."""
    digest = hashlib.sha256()
    for part in reachable_bytes(runtime.cache, handle.live().request).values():
        digest.update(part)
    digest.update(handle.live().logits.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("last", [140, pytest.param(300, marks=pytest.mark.long)])
def test_fork_at_each_position(small_checkpoint, last):
    """Forks of forks, one at each of the positions 1 .. last: what each generates is a cold run's, token by token and byte
    by byte, and its origin does not notice.

    All are fed one token at a time, so that every matrix product has the same shape.
    """
    options = {"num_pages": 12, "max_requests": 4, "max_ends": 0}

    def one_more(handle):
        handle.generate(1, temperature=1.0, seed=handle.seq_len, stop=())
        return handle

    cold = make_runtime(small_checkpoint, **options)
    handle = cold.open(make_tokens(1))
    expected = {1: fingerprint(cold, handle)}
    while handle.seq_len <= last + 1:
        one_more(handle)
        expected[handle.seq_len] = fingerprint(cold, handle)
    runtime = make_runtime(small_checkpoint, **options)
    trunk = runtime.open(make_tokens(1))
    for length in range(1, last + 1):
        branch = one_more(trunk.fork())
        assert branch.tokens == handle.tokens[: length + 1]
        assert fingerprint(runtime, branch) == expected[length + 1], f"fork at {length}"
        assert fingerprint(runtime, trunk) == expected[length], f"origin at {length}"
        if length % 7 == 0:  # both sharers of a page write
            assert fingerprint(runtime, one_more(trunk)) == expected[length + 1]
        trunk.close()
        trunk = branch
    runtime.cache.check_integrity(memory=True)


def test_forks_generate_what_their_origin_would(runtime):
    trunk = runtime.open(make_tokens(130))
    branches = [trunk.fork() for _ in range(3)]
    expected = trunk.generate(9, stop=()).tokens
    assert [branch.generate(9, stop=()).tokens for branch in branches] == [expected] * 3
    other = branches[0].fork().generate(9, temperature=3.0, seed=1, stop=()).tokens
    assert other != branches[0].generate(9, stop=()).tokens


@pytest.mark.parametrize(
    ("length", "backs"), [(20, (1, 8)), (128, (0, 8)), (131, range(DRAFT + 1)), (257, (1, 2, 5, 8)), (260, (4, 8))]
)
def test_truncate_and_go_on(runtime, small_oracle, length, backs):
    for back in backs:
        with runtime.open(make_tokens(length)) as handle:
            handle.truncate(length - back)
            assert list(handle.tokens) == make_tokens(length)[: length - back]
            handle.generate(2, stop=())
            assert handle.seq_len == length - back + 2
            assert_right(small_oracle, handle)


def test_truncate_again_and_fork_what_is_pending(runtime, small_oracle):
    handle = runtime.open(make_tokens(140))
    handle.generate(6, temperature=1.0, seed=0)
    handle.truncate(144).truncate(139)
    twin, kept = handle.fork(), handle.snapshot()
    for other in (handle, twin, runtime.restore(kept)):
        other.append(make_tokens(3, salt=9))
        assert other.seq_len == 142
        assert_right(small_oracle, other)


def test_truncate_too_far_says_where_it_could_go(runtime):
    handle = runtime.open(make_tokens(200))
    for n in (191, 201, -1):
        with pytest.raises(TruncateError, match=rf"length of 192 .. 200, got {n}; open\(handle"):
            handle.truncate(n)
    assert handle.min_len == 192 and handle.seq_len == 200
    assert handle.truncate(200).seq_len == 200
    short = runtime.open(make_tokens(5)).truncate(0)
    assert short.tokens == () and short.text == ""
    with pytest.raises(ValueError, match="expected at least one token, got none"):
        short.generate(1)
    assert short.append(make_tokens(5)).seq_len == 5


@pytest.mark.parametrize("length", [1, 130, 256])
def test_snapshots_restore_exactly(runtime, length):
    handle = runtime.open(make_tokens(length))
    before, kept = fingerprint(runtime, handle), handle.snapshot()
    expected = handle.generate(20, stop=()).tokens
    handle.close()
    for _ in range(2):
        again = runtime.restore(kept)
        assert fingerprint(runtime, again) == before
        assert again.generate(20, stop=()).tokens == expected
        again.close()
    kept.release()
    kept.release()
    with pytest.raises(UnknownRequestError, match="expected a snapshot that is held"):
        runtime.restore(kept)
    assert_nothing_held(runtime)


def test_append_is_a_longer_prompt(runtime, small_oracle):
    handle = runtime.open(make_tokens(126))
    handle.append(make_tokens(7, salt=1)).append("and text")
    assert handle.text.endswith("and text") and handle.seq_len == 141
    assert_right(small_oracle, handle)


def test_closed_handles_say_so(runtime):
    handle = runtime.open("abc")
    handle.close()
    handle.close()
    assert handle.is_closed and handle.seq_len == 3
    for action in (
        handle.fork,
        handle.snapshot,
        handle.show,
        lambda: handle.generate(1),
        lambda: handle.append("d"),
        lambda: handle.truncate(2),
        lambda: runtime.save(handle, "nowhere"),
        lambda: runtime.generate([handle], 1),
    ):
        with pytest.raises(UnknownRequestError, match=r"Handle\(seq_len=3, closed\): expected an open"):
            action()


def test_what_nobody_refers_to_is_freed(runtime):
    """Cells of a notebook are run again, and their old handles are gone."""
    for _ in range(3 * runtime.cache.requests.allocator.capacity.state_slots):
        handle = runtime.open(make_tokens(10))
        kept = handle.snapshot()
    assert len(runtime.report().cache.requests) == 1
    del handle, kept
    gc.collect()
    assert_nothing_held(runtime)


@pytest.mark.parametrize("length", [3, 50, 128, 131])
def test_a_step_that_fails_half_way_leaves_no_trace(runtime, small_oracle, monkeypatch, length):
    """Some layers are written then, and some are not: handles stay as they were, and prompts are closed."""
    handle, other = runtime.open(make_tokens(length)), runtime.open(make_tokens(60, salt=1))
    before = fingerprint(runtime, handle), fingerprint(runtime, other), handle.tokens
    layer = runtime.engine.model.model.model.layers[1]

    def fail(*args, **kwargs):
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(layer.mlp, "forward", fail)
        for action in (
            lambda: handle.generate(3),
            lambda: runtime.generate([handle, make_tokens(9), other], 3),
            lambda: handle.append(make_tokens(100, salt=2)),
        ):
            with pytest.raises(RuntimeError, match="device lost"):
                action()
    assert (fingerprint(runtime, handle), fingerprint(runtime, other), handle.tokens) == before
    handle.append(make_tokens(140, salt=3))
    assert_right(small_oracle, handle)
    handle.close()
    other.close()
    assert_nothing_held(runtime)


def test_the_model_is_not_called_past_the_runtime(runtime):
    with pytest.raises(RuntimeError, match="expected a call through it, got a direct one"):
        runtime.engine.model.model(torch.tensor([[1, 2]]))


def test_generate_that_does_not_fit_changes_nothing(small_checkpoint):
    runtime = make_runtime(small_checkpoint, num_pages=3, debug=True)
    handle = runtime.open(make_tokens(340))
    before = fingerprint(runtime, handle)
    with pytest.raises(OutOfPagesError, match="45 more tokens need 1 history pages: expected that many free"):
        handle.generate(45)
    with pytest.raises(OutOfPagesError, match="300 more tokens need"):
        handle.append(make_tokens(300))
    assert handle.seq_len == 340 and fingerprint(runtime, handle) == before
    assert handle.generate(44, stop=()).finish == "length"  # the last token of the third page
    with pytest.raises(OutOfPagesError, match="1 more tokens need 1 history pages"):
        runtime.open(make_tokens(1, salt=1))
    handle.close()
    assert_nothing_held(runtime)


def test_a_page_that_must_be_copied_counts(small_checkpoint):
    runtime = make_runtime(small_checkpoint, num_pages=3, debug=True)
    handle = runtime.open(make_tokens(240))  # two pages, one is free
    twin = handle.fork()
    with pytest.raises(OutOfPagesError, match="17 more tokens need 2 history pages"):
        twin.generate(17, stop=())
    assert twin.seq_len == 240
    assert len(twin.generate(16, stop=()).tokens) == 16


def test_no_slot_for_another_handle(small_checkpoint):
    runtime = make_runtime(small_checkpoint, max_requests=2)
    handles = [runtime.open("a"), runtime.open("b")]
    for action in (lambda: runtime.open("c"), handles[0].fork, lambda: runtime.generate(["c"], 1)):
        with pytest.raises(OutOfPagesError, match="state slots: expected 1 free, got 0 of 2"):
            action()
    handles[0].close()
    assert torch.isfinite(logprobs_behind(runtime.open("c"))).all()
