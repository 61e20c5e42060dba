"""P4 and P5: what a request owns, and operations that cannot be done."""

import random

import pytest
import torch

from dsv4_kernels.memory import set_poison
from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.cache.regions import Kind, Part
from sglang_dsv4.errors import CacheInvariantError, OutOfPagesError, StalePlanError, UnknownRequestError
from tests.cache.driver import WindowInput, append, append_all, feed, make_spec, random_sequence, reachable_bytes


def state_of(cache):
    """Everything on the host that an operation could change."""
    pages = cache.requests.allocator
    return (
        list(pages.history.free),
        list(pages.window.free),
        list(pages.slots.free),
        [(r.req_id, r.seq_len, list(r.pages.history), list(r.pages.window)) for r in cache.requests.opened],
        cache.requests.epoch,
    )


@pytest.fixture
def cache():
    return CompressedKVCache(make_spec(), num_pages=4, max_requests=2, num_window_pages=4)


def test_plan_changes_nothing(cache):
    request = cache.open()
    before = state_of(cache)
    cache.plan([(request, 700)])
    assert state_of(cache) == before


@pytest.mark.parametrize(
    ("counts", "window_pages", "pool", "needed", "free"),
    [
        ((700, 300), 4, "history pages", 5, 4),
        ((1100, 300), 4, "history pages", 7, 4),  # of all requests, also if the first alone does not fit
        ((700, 1), 2, "window pages", 4, 2),
    ],
)
def test_out_of_pages_names_numbers_and_changes_nothing(counts, window_pages, pool, needed, free):
    cache = CompressedKVCache(make_spec(), num_pages=4, max_requests=2, num_window_pages=window_pages)
    requests = cache.open(), cache.open()
    before = state_of(cache)
    message = f"{pool}: expected {needed} free, got {free} of {free}; nothing was changed"
    with pytest.raises(OutOfPagesError, match=message) as raised:
        cache.plan(list(zip(requests, counts, strict=True)))
    assert (raised.value.pool, raised.value.needed, raised.value.free) == (pool, needed, free)
    assert state_of(cache) == before
    cache.plan([(requests[0], 256), (requests[1], 256)])


def test_out_of_state_slots(cache):
    cache.open(), cache.open()
    before = state_of(cache)
    with pytest.raises(OutOfPagesError, match="state slots: expected 1 free, got 0 of 2"):
        cache.open()
    assert state_of(cache) == before


def test_stale_plan_is_refused(cache):
    sequence = random_sequence(cache.spec, 10)
    request = cache.open()
    plan = cache.plan([(request, 4)])
    other = cache.plan([(request, 2)])
    append_all(cache, other, [(sequence, 0, 2)])
    with pytest.raises(StalePlanError, match="its last plan was appended"):
        append_all(cache, plan, [(sequence, 0, 4)])
    cache.commit(other)
    message = r"expected one made after Request\(req_id=0, seq_len=2\) last changed, at epoch 3, got one of epoch 1"
    with pytest.raises(StalePlanError, match=message):
        append_all(cache, plan, [(sequence, 0, 4)])
    with pytest.raises(StalePlanError, match=message):
        cache.commit(plan)
    with pytest.raises(StalePlanError, match="expected a new one, got one that is over"):
        cache.commit(other)
    assert request.seq_len == 2


def test_commit_needs_every_part(cache):
    request = cache.open()
    plan = cache.plan([(request, 4)])
    given = random_sequence(cache.spec, 4).parts[0]["window"]
    append(cache, 0, plan, window=given)
    with pytest.raises(StalePlanError, match="missing layer 1 window, 1 main, "):
        cache.commit(plan)
    assert request.seq_len == 0


def test_a_part_is_appended_once(cache):
    request = cache.open()
    plan = cache.plan([(request, 4)])
    given = random_sequence(cache.spec, 4).parts[0]["window"]
    append(cache, 0, plan, window=given)
    with pytest.raises(StalePlanError, match="layer 0 window: expected once"):
        append(cache, 0, plan, window=given)


def test_an_appended_plan_must_be_committed_abandoned_or_closed(cache):
    request, other = cache.open(), cache.open()
    sequence = random_sequence(cache.spec, 8)
    append_all(cache, cache.plan([(request, 4)]), [(sequence, 0, 4)])
    with pytest.raises(StalePlanError, match="expected commit, abandon or close"):
        cache.plan([(request, 4)])
    feed(cache, [(other, sequence, 4)])
    cache.close(request)
    cache.check_integrity()


@pytest.mark.parametrize(
    ("field", "error", "message"),
    [
        ("shape", ValueError, r"layer 0 window: expected shape \(4, 512\), got \(3, 512\)"),
        ("dtype", TypeError, r"layer 0 window: expected torch.float32 or torch.bfloat16, got torch.float16"),
        ("part", ValueError, r"layer 0 \(window\): expected parts window, got main"),
    ],
)
def test_wrong_input_is_named_and_nothing_is_written(cache, field, error, message):
    request = cache.open()
    plan = cache.plan([(request, 4)])
    sequence = random_sequence(cache.spec, 4)
    window = sequence.parts[0]["window"]
    before = [t.clone() for layer in cache.storage.layers for ts in layer.tensors().values() for t in ts]
    with pytest.raises(error, match=message):
        if field == "shape":
            append(cache, 0, plan, window=WindowInput(window.kv[:3], window.norm_weight, 1e-6))
        elif field == "dtype":
            append(cache, 0, plan, window=WindowInput(window.kv.half(), window.norm_weight, 1e-6))
        else:
            append(cache, 0, plan, window=window, main=sequence.parts[2]["main"])
    after = [t for layer in cache.storage.layers for ts in layer.tensors().values() for t in ts]
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, after, strict=True))
    assert not plan.appended


def test_closed_and_foreign_requests_are_refused(cache):
    request = cache.open()
    cache.close(request)
    for action in (lambda: cache.plan([(request, 1)]), lambda: cache.close(request)):
        with pytest.raises(UnknownRequestError, match="expected a request opened by this cache"):
            action()
    foreign = CompressedKVCache(make_spec(), num_pages=1, max_requests=1).open()
    cache.open()
    with pytest.raises(UnknownRequestError):
        cache.plan([(foreign, 1)])


def test_a_request_twice_or_negative(cache):
    request = cache.open()
    with pytest.raises(ValueError, match="each request once"):
        cache.plan([(request, 1), (request, 1)])
    with pytest.raises(ValueError, match="expected 0 or more new tokens, got -1"):
        cache.plan([(request, -1)])
    for count in (1.5, True, "1"):
        with pytest.raises(TypeError, match=f"expected an integer of new tokens, got {count!r}"):
            cache.plan([(request, count)])


def test_window_pages_are_freed_when_no_query_reaches_them(cache):
    sequence = random_sequence(cache.spec, 1024)
    request = cache.open()
    feed(cache, [(request, sequence, 1024)])
    # The next query, at 1024, reaches back to 897: page 3 only.
    assert [page >= 0 for page in request.pages.window] == [False, False, False, True]
    assert cache.requests.allocator.counts()["window_pages_free"] == 3
    cache.check_integrity(memory=True)


def test_pages_are_conserved_over_a_thousand_opens_and_closes():
    """P5, with poisoned memory: what a closed request wrote is overwritten or never read."""
    spec = make_spec()
    set_poison(True)
    try:
        cache = CompressedKVCache(spec, num_pages=24, max_requests=8, num_window_pages=16)
    finally:
        set_poison(False)
    sequences = [random_sequence(spec, 900, seed=s) for s in range(2)]
    rng = random.Random(0)
    running, opened = [], 0
    while opened < 1000 or running:
        if opened < 1000 and len(running) < 8 and rng.random() < 0.7:
            running.append((cache.open(), rng.choice(sequences), rng.choice([1, 2, 3, 5, 9, 130, 300, 700])))
            opened += 1
        if running and rng.random() < 0.25:
            chosen = rng.sample(running, rng.randint(1, len(running)))
            items = [(r, s, rng.choice([0, n - r.seq_len, 1])) for r, s, n in chosen if r.seq_len < n]
            try:
                feed(cache, items)
            except OutOfPagesError:
                cache.check_integrity()
        done = [item for item in running if item[0].seq_len >= item[2] or rng.random() < 0.3]
        for item in done:
            cache.close(item[0])
            running.remove(item)
        cache.check_integrity()
    counts = cache.requests.allocator.counts()
    assert counts["history_pages_free"] == counts["history_pages"] == 24
    assert counts["window_pages_free"] == counts["window_pages"] == 16
    assert counts["state_slots_free"] == counts["state_slots"] == 8


def test_no_cross_talk_between_requests_that_reuse_pages():
    """Two requests in turn on the same pages and slot give the bytes each gives alone."""
    spec = make_spec()
    sequences = [random_sequence(spec, 300, seed=s) for s in range(3)]
    cache = CompressedKVCache(spec, num_pages=2, max_requests=1)
    for sequence in (*sequences, sequences[0]):
        alone = CompressedKVCache(spec, num_pages=2, max_requests=1)
        handle, expected = cache.open(), alone.open()
        for count in (3, 130, 167):
            feed(cache, [(handle, sequence, count)])
            feed(alone, [(expected, sequence, count)])
        assert reachable_bytes(cache, handle) == reachable_bytes(alone, expected)
        cache.close(handle)


@pytest.mark.parametrize(
    ("label", "damage"),
    [
        ("I1", lambda cache, request: cache.requests.allocator.history.free.append(request.pages.history[0])),
        ("I1", lambda cache, request: cache.requests.allocator.history.free.pop()),
        ("I2", lambda cache, request: cache.requests.allocator.window.free.append(request.pages.window[-1])),
        ("I3", lambda cache, request: cache.requests.allocator.slots.free.append(request.state_slot)),
        ("I4", lambda cache, request: setattr(request, "seq_len", 900)),
        ("I5", lambda cache, request: setattr(request, "min_len", 400)),
    ],
)
def test_each_page_invariant_is_checked_under_its_label(cache, label, damage):
    request = cache.open()
    feed(cache, [(request, random_sequence(cache.spec, 301), 301)])
    cache.check_integrity(memory=True)
    damage(cache, request)
    with pytest.raises(CacheInvariantError, match=f"^{label} "):
        cache.check_integrity()


@pytest.mark.parametrize(
    ("label", "layer_id", "what", "tensor"),
    [
        ("I6", 0, "window row", lambda layer, slot: layer.pool[slot["window"]]),
        ("I6", 1, "entry", lambda layer, slot: layer.pool[slot["entry"]]),
        ("I6", 1, "index key", lambda layer, slot: layer.tensor(Kind.INDEX_KEY, Part.INDEX)[slot["key"]]),
        ("I7", 1, "main stream row", lambda layer, slot: layer.tensor(Kind.STREAM, Part.MAIN)[slot["state"], 300 % 8]),
        ("I7", 2, "accumulator", lambda layer, slot: layer.tensor(Kind.ACCUMULATOR, Part.MAIN)[slot["state"], 0, 1]),
    ],
)
def test_each_memory_invariant_is_checked_under_its_label(cache, label, layer_id, what, tensor):
    request = cache.open()
    feed(cache, [(request, random_sequence(cache.spec, 301), 301)])
    slot = {
        "window": request.pages.window[-1] * 256 + 44,
        "entry": cache.storage.num_window_rows + request.pages.history[0] * 64 + 5,
        "key": request.pages.history[0] * 64 + 5,
        "state": request.state_slot,
    }
    tensor(cache.storage.layers[layer_id], slot).fill_(float("nan"))
    with pytest.raises(CacheInvariantError, match=f"^{label} .*layer {layer_id}: {what}"):
        cache.check_integrity(memory=True)


def test_boundary_state_is_checked(cache):
    request = cache.open()
    feed(cache, [(request, random_sequence(cache.spec, 257), 257)])
    cache.storage.layers[1].tensor(Kind.BOUNDARY, Part.MAIN)[request.pages.window[0]].fill_(float("nan"))
    with pytest.raises(CacheInvariantError, match="^I7 .*layer 1: main boundary row"):
        cache.check_integrity(memory=True)


def test_a_plan_of_another_cache_is_refused():
    """Two caches at the same epoch: the numbers fit, the pages are others."""
    caches = [CompressedKVCache(make_spec(), num_pages=2, max_requests=1) for _ in range(2)]
    requests = [cache.open() for cache in caches]
    sequence = random_sequence(caches[0].spec, 8)
    plan = caches[0].plan([(requests[0], 8)])
    for action in (
        lambda: append_all(caches[1], plan, [(sequence, 0, 8)]),
        lambda: caches[1].commit(plan),
        lambda: caches[1].layers[1].select(plan, None, None),
    ):
        with pytest.raises(StalePlanError, match="expected one of this cache, got another cache's"):
            action()


def test_select_before_append_is_refused(cache):
    plan = cache.plan([(cache.open(), 8)])
    with pytest.raises(StalePlanError, match="layer 1: expected its index keys appended before select"):
        cache.layers[1].select(plan, torch.zeros(8, 4, 128), torch.zeros(8, 4))
