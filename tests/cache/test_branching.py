"""P1, P3 and P5 under fork, truncate, snapshot and restore: every order of operations gives the bytes of a full forward."""

import pytest
import torch

from dsv4_kernels.memory import set_poison
from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.errors import OutOfPagesError, StalePlanError, TruncateError, UnknownRequestError
from tests.cache.driver import (
    FORMATS,
    CompressorInput,
    TokenInputs,
    WindowInput,
    append,
    append_all,
    feed,
    make_spec,
    random_sequence,
    reachable_bytes,
)

DRAFT = 5
VOCABULARY = 7


def make_cache(formats=("bf16", "bf16"), num_pages=24, max_requests=6, draft=DRAFT, checks="off"):
    """Small pages, poisoned memory."""
    set_poison(True)
    spec = make_spec(formats, page_tokens=128, max_draft_tokens=draft)
    return CompressedKVCache(spec, num_pages=num_pages, max_requests=max_requests, checks=checks)


class Words:
    """Inputs that depend on the token alone, so that a list of tokens is a sequence."""

    def __init__(self, spec):
        self.table = random_sequence(spec, VOCABULARY, seed=11)
        self._known = {}

    def inputs(self, tokens):
        picked = torch.tensor(tokens, dtype=torch.int64)

        def pick(given):
            if isinstance(given, WindowInput):
                return WindowInput(given.kv[picked], given.norm_weight, given.eps)
            return CompressorInput(given.kv_score[picked], given.slot_bias, given.norm_weight, given.eps)

        parts = tuple({part: pick(given) for part, given in layer.items()} for layer in self.table.parts)
        return TokenInputs(parts)

    def append(self, cache, request, tokens, new):
        """Append ``new`` behind ``tokens``; returns both."""
        assert request.seq_len == len(tokens)
        plan = cache.plan([(request, len(new))])
        append_all(cache, plan, [(self.inputs(new), 0, len(new))])
        cache.commit(plan)
        return [*tokens, *new]

    def expected(self, cache, tokens):
        """What one full forward of these tokens leaves where a query can reach."""
        key = tuple(tokens)
        if key not in self._known:
            fresh = CompressedKVCache(cache.spec, num_pages=max(1, -(-len(tokens) // cache.spec.page_tokens)), max_requests=1)
            request = fresh.open()
            if tokens:
                feed(fresh, [(request, self.inputs(tokens), len(tokens))])
            self._known[key] = reachable_bytes(fresh, request)
        return self._known[key]


def words(count, salt=0):
    return [(i * i + salt) % VOCABULARY for i in range(count)]


@pytest.fixture(params=[("bf16", "bf16"), ("fp8_584", "fp8")], ids="-".join)
def cache(request):
    return make_cache(request.param)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 126, 127, 128, 129, 131, 255, 256, 260, 383])
def test_fork_at_every_kind_of_position(cache, length):
    text = Words(cache.spec)
    first = cache.open()
    tokens = text.append(cache, first, [], words(length)) if length else []
    before = cache.requests.allocator.counts()
    second = cache.fork(first)
    after = cache.requests.allocator.counts()
    assert after["history_pages_free"] == before["history_pages_free"]  # a fork takes no page
    left = text.append(cache, first, tokens, words(9, 1))
    right = text.append(cache, second, tokens, words(140, 2))
    left = text.append(cache, first, left, words(130, 3))
    cache.check_integrity(memory=True)
    assert reachable_bytes(cache, first) == text.expected(cache, left)
    assert reachable_bytes(cache, second) == text.expected(cache, right)


def test_two_sharers_that_write_in_one_step(cache):
    text = Words(cache.spec)
    first = cache.open()
    tokens = text.append(cache, first, [], words(200))
    twins = [first, cache.fork(first), cache.fork(first)]
    texts = [[*tokens, *words(7 + 60 * i, i)] for i in range(3)]
    feed(cache, [(twin, text.inputs(both), len(both) - 200) for twin, both in zip(twins, texts, strict=True)])
    cache.check_integrity(memory=True)
    for twin, both in zip(twins, texts, strict=True):
        assert reachable_bytes(cache, twin) == text.expected(cache, both)


@pytest.mark.parametrize("length", [6, 127, 128, 129, 130, 133, 257, 261])
def test_truncate_and_go_on(cache, length):
    """Back by each number of draft tokens, across blocks and pages, in one step or one token at a time."""
    text = Words(cache.spec)
    trunk = cache.open()
    tokens = text.append(cache, trunk, [], words(length - 3))
    for token in words(3, 4):
        tokens = text.append(cache, trunk, tokens, [token])
    branches = [*(cache.fork(trunk) for _ in range(DRAFT)), trunk]
    texts = [tokens[: length - back] for back in range(DRAFT + 1)]
    for branch, mine in zip(branches, texts, strict=True):
        cache.truncate(branch, len(mine))
        assert branch.seq_len == len(mine)
    cache.check_integrity(memory=True)
    for new in [*([token] for token in words(DRAFT + 1, 5)), words(131, 6)]:
        texts = [[*mine, *new] for mine in texts]
        items = zip(branches, map(text.inputs, texts), [len(new)] * len(texts), strict=True)
        feed(cache, list(items))
    for branch, mine in zip(branches, texts, strict=True):
        assert reachable_bytes(cache, branch) == text.expected(cache, mine)


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
@pytest.mark.parametrize("length", [450, 386])
def test_a_fork_that_writes_and_is_cut_back_has_the_rows_of_the_shorter_length(formats, length):
    """The first write copies what the request needs at any length that it may be cut back to, not at its own alone.

    Pages of 256 tokens are longer than a window: the oldest row that a cut needs lies in the page that is copied.
    """
    set_poison(True)
    cache = CompressedKVCache(make_spec(formats, max_draft_tokens=DRAFT), num_pages=6, max_requests=3)
    text = Words(cache.spec)
    trunk = cache.open()
    tokens = text.append(cache, trunk, [], words(length))
    for back in range(1, DRAFT):
        twin = cache.fork(trunk)
        text.append(cache, twin, tokens, [3])
        assert twin.pages.window[-1] != trunk.pages.window[-1]
        cache.truncate(twin, length - back)
        cache.check_integrity(memory=True)
        assert reachable_bytes(cache, twin) == text.expected(cache, tokens[: length - back])
        both = text.append(cache, twin, tokens[: length - back], words(7, 2))
        assert reachable_bytes(cache, twin) == text.expected(cache, both)
        cache.close(twin)


def test_truncate_too_far_says_where_it_could_go(cache):
    text = Words(cache.spec)
    request = cache.open()
    tokens = text.append(cache, request, [], words(150))
    taken = cache.snapshot(request)
    text.append(cache, request, tokens, words(50))
    for length in (194, 201, -1):
        with pytest.raises(TruncateError, match=rf"length of 195 .. 200, or a snapshot \(taken at \[150\]\), got {length}"):
            cache.truncate(request, length)
    assert request.seq_len == 200
    cache.truncate(request, 195)
    with pytest.raises(TruncateError, match="length of 195 .. 195"):
        cache.truncate(request, 194)  # older rows were overwritten when the later ones came
    cache.rewind(request, taken)
    assert request.seq_len == 150
    tokens = text.append(cache, request, tokens, words(30, 9))
    assert reachable_bytes(cache, request) == text.expected(cache, tokens)


def test_a_rewound_request_can_go_no_further_back_than_its_snapshot(cache):
    """The snapshot's draft room was used up when it was taken; its state holds nothing older."""
    text = Words(cache.spec)
    request = cache.open()
    tokens = text.append(cache, request, [], words(200))
    cache.truncate(request, 195)
    taken = cache.snapshot(request)
    text.append(cache, request, tokens[:195], words(50))
    cache.rewind(request, taken)
    for sequence in (request, cache.restore(taken), cache.fork(request)):
        with pytest.raises(TruncateError, match="length of 195 .. 195"):
            cache.truncate(sequence, 194)


def test_a_snapshot_outlives_its_request_and_can_be_restored_twice(cache):
    text = Words(cache.spec)
    request = cache.open()
    tokens = text.append(cache, request, [], words(261))
    taken = cache.snapshot(request)
    text.append(cache, request, tokens, words(100, 1))
    cache.close(request)
    cache.check_integrity()
    for salt in (2, 3):
        again = cache.restore(taken)
        both = text.append(cache, again, tokens, words(130, salt))
        assert reachable_bytes(cache, again) == text.expected(cache, both)
        cache.close(again)
    cache.close(taken)
    counts = cache.requests.allocator.counts()
    assert counts["history_pages_free"] == counts["history_pages"]
    assert counts["window_pages_free"] == counts["window_pages"]


def test_released_and_foreign_snapshots_are_refused(cache):
    request = cache.open()
    taken = cache.snapshot(request)
    cache.close(taken)
    for action in (lambda: cache.close(taken), lambda: cache.restore(taken), lambda: cache.rewind(request, taken)):
        with pytest.raises(UnknownRequestError, match="expected a snapshot taken by this cache and not released"):
            action()


def test_a_fork_without_a_slot_changes_nothing():
    cache = make_cache(max_requests=1)
    request = cache.open()
    taken = cache.snapshot(request)
    epoch = cache.requests.epoch
    for action in (lambda: cache.fork(request), lambda: cache.restore(taken)):
        with pytest.raises(OutOfPagesError, match="state slots: expected 1 free, got 0 of 1"):
            action()
    assert cache.requests.epoch == epoch
    cache.check_integrity()


def test_copy_on_write_without_a_page_changes_nothing():
    cache = make_cache(num_pages=2)
    text = Words(cache.spec)
    first = cache.open()
    tokens = text.append(cache, first, [], words(200))
    second = cache.fork(first)
    epoch = cache.requests.epoch
    with pytest.raises(OutOfPagesError, match="history pages: expected 1 free, got 0 of 2"):
        cache.plan([(second, 1)])
    assert cache.requests.epoch == epoch
    cache.close(first)
    tokens = text.append(cache, second, tokens, words(9))
    assert reachable_bytes(cache, second) == text.expected(cache, tokens)


def test_no_operation_between_append_and_commit():
    cache = make_cache()
    text = Words(cache.spec)
    request = cache.open()
    plan = cache.plan([(request, 4)])
    given = text.inputs(words(4))
    append(cache, 0, plan, window=given.cut(0, "window", 0, 4))
    for action in (cache.fork, cache.snapshot, lambda r: cache.truncate(r, 0)):
        with pytest.raises(StalePlanError, match="expected commit, abandon or close"):
            action(request)


def test_forking_at_each_of_the_first_300_positions():
    """A trunk that grows by one token; at every position a branch goes its own way, and equals a cold run of its text."""
    cache = make_cache()
    text = Words(cache.spec)
    trunk, tokens, branches = cache.open(), [], []
    for position in range(300):
        tokens = text.append(cache, trunk, tokens, [position * 3 % VOCABULARY])
        branch = cache.fork(trunk)
        both = text.append(cache, branch, tokens, words(6, position))
        branches.append((both, reachable_bytes(cache, branch)))
        cache.close(branch)
    assert reachable_bytes(cache, trunk) == text.expected(cache, tokens)
    for begin in range(0, 300, 20):  # cold runs, twenty in a batch
        cold = make_cache(num_pages=60, max_requests=20)
        batch = [(cold.open(), *branch) for branch in branches[begin : begin + 20]]
        feed(cold, [(request, text.inputs(both), len(both)) for request, both, _ in batch])
        for request, both, found in batch:
            assert found == reachable_bytes(cold, request), len(both)


@pytest.mark.parametrize("length", [1_000, 10_000, 100_001])
def test_what_fork_and_truncate_copy_does_not_depend_on_the_length(length):
    """A fork copies the stream state; the first write after it, at most one page; truncating to a length, nothing."""
    spec = make_spec(max_draft_tokens=DRAFT)
    pages = length // spec.page_tokens + 3
    cache = CompressedKVCache(spec, num_pages=pages, max_requests=2, num_window_pages=4)
    text = Words(spec)
    trunk = cache.requests.adopt(length, length - DRAFT)
    twin = cache.fork(trunk)
    report = cache.report()
    assert report.bytes_copied == {
        "fork": report.stream_bytes_per_request,
        "snapshot": 0,
        "restore": 0,
        "copy_on_write": 0,
        "undo": 0,
    }
    assert report.counts["history_pages_free"] == 3 - (length % spec.page_tokens > 0)
    cache.truncate(twin, length - DRAFT)
    assert cache.report().bytes_copied == report.bytes_copied
    plan = cache.plan([(twin, 1)])
    append_all(cache, plan, [(text.inputs([1]), 0, 1)])
    cache.commit(plan)
    copied = cache.report().bytes_copied["copy_on_write"]
    assert copied <= report.history_page_bytes + report.window_page_bytes
    assert (copied > 0) == (length % spec.page_tokens > 0)


def test_what_was_overwritten_stays_out_of_reach():
    """After a roll-back and a new token, the rows of the first roll-back's depth are gone for good."""
    cache = make_cache()
    text = Words(cache.spec)
    request = cache.open()
    tokens = text.append(cache, request, [], words(200))
    cache.truncate(request, 195)
    text.append(cache, request, tokens[:195], [3])
    with pytest.raises(TruncateError, match="length of 195 .. 196"):
        cache.truncate(request, 191)
