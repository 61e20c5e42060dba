"""P4 of a step: what others do does not harm it, and what is not committed can be taken back without a trace."""

import pytest

from sglang_dsv4.cache.pages.step_undo import UndoCopies
from sglang_dsv4.errors import StalePlanError
from tests.cache.driver import FORMATS, append, append_all, feed, reachable_bytes
from tests.cache.test_branching import DRAFT, Words, make_cache, words
from tests.cache.test_requests import state_of

CASES = [(FORMATS[0], length) for length in (0, 1, 3, 4, 127, 128, 131, 256, 259)]
CASES += [(formats, length) for formats in FORMATS[1:] for length in (128, 259)]


def append_some(cache, plan, given, layers):
    """The first parts of a step: every part of some layers, and of the next one only its window."""
    count = plan.num_tokens
    for layer in range(layers):
        parts = [part.value for part in cache.layers[layer].parts]
        append(cache, layer, plan, **{part: given.cut(layer, part, 0, count) for part in parts})
    if layers < len(cache.layers):
        append(cache, layers, plan, window=given.cut(layers, "window", 0, count))


def books(cache):
    """What `state_of` says of the pages and requests, without the epoch, which only goes up."""
    return state_of(cache)[:-1]


@pytest.mark.parametrize(("formats", "length"), CASES, ids=str)
@pytest.mark.parametrize("draft", [0, DRAFT])
def test_an_abandoned_step_leaves_no_trace(formats, length, draft):
    cache = make_cache(formats, draft=draft)
    text = Words(cache.spec)
    request = cache.open()
    tokens = text.append(cache, request, [], words(length)) if length else []
    for new, layers in ((1, 3), (DRAFT, 2), (DRAFT + 1, 0), (140, 3), (2, 1), (300, 1)):
        before, min_len = books(cache), request.min_len
        plan = cache.plan([(request, new)])
        append_some(cache, plan, text.inputs(words(new, 4)), layers)
        cache.check_integrity()
        cache.abandon(plan)
        cache.check_integrity(memory=True)
        used = max(min_len, length + new - draft) if new <= draft else min_len
        assert request.min_len == used
        if used == min_len:  # otherwise window pages that are out of reach now may be free
            assert books(cache) == before
        assert reachable_bytes(cache, request) == text.expected(cache, tokens)
    twin = cache.fork(request)
    tokens = text.append(cache, request, tokens, words(3, 1))
    tokens = text.append(cache, request, tokens, words(140, 2))
    assert reachable_bytes(cache, request) == text.expected(cache, tokens)
    cut = text.append(cache, twin, tokens[:length], [5])
    cache.truncate(twin, twin.min_len)  # as far back as it says it can
    cut = text.append(cache, twin, cut[: twin.seq_len], words(140, 3))
    assert reachable_bytes(cache, twin) == text.expected(cache, cut)


@pytest.mark.parametrize("draft", [0, DRAFT])
def test_the_twin_without_the_undo_copy_differs(draft, monkeypatch):
    """What `test_an_abandoned_step_leaves_no_trace` would see if nothing were put back."""
    monkeypatch.setattr(UndoCopies, "put_back", lambda self, plan, item: True)
    cache = make_cache(draft=draft)
    text = Words(cache.spec)
    request = cache.open()
    tokens = text.append(cache, request, [], words(131))
    plan = cache.plan([(request, DRAFT + 1)])
    append_some(cache, plan, text.inputs(words(DRAFT + 1, 4)), 3)
    cache.abandon(plan)
    tokens = text.append(cache, request, tokens, words(140, 2))
    found, expected = reachable_bytes(cache, request), text.expected(cache, tokens)
    assert [key for key in found if found[key] != expected[key]] != []


def test_a_short_step_needs_no_copy_and_uses_up_draft_room():
    cache = make_cache()
    text = Words(cache.spec)
    request = cache.open()
    tokens = text.append(cache, request, [], words(200))
    plan = cache.plan([(request, 2)])
    append_some(cache, plan, text.inputs(words(2)), 3)
    assert cache.report().bytes_by_pool["undo"] == 0
    cache.abandon(plan)
    assert (request.min_len, request.seq_len) == (197, 200)
    cache.truncate(request, 197)
    tokens = text.append(cache, request, tokens[:197], words(140, 3))
    assert reachable_bytes(cache, request) == text.expected(cache, tokens)


def test_undo_copies_are_counted_and_dropped():
    cache = make_cache()
    text = Words(cache.spec)
    requests = [cache.open() for _ in range(3)]
    for request in requests[:2]:
        text.append(cache, request, [], words(10))
    state = cache.report().stream_bytes_per_request

    def begin():
        plan = cache.plan([(requests[0], DRAFT + 1), (requests[1], DRAFT), (requests[2], 50)])
        append(cache, 0, plan, window=text.inputs(words(plan.num_tokens)).parts[0]["window"])
        assert cache.report().bytes_by_pool["undo"] == state  # of the first: others need none
        return plan

    cache.abandon(begin())
    assert cache.report().bytes_by_pool["undo"] == 0
    plan = begin()
    for request in requests:
        cache.close(request)
    assert cache.report().bytes_by_pool["undo"] == 0
    assert cache.report().bytes_copied["undo"] == 2 * state
    with pytest.raises(StalePlanError, match="or whose requests are all closed"):
        cache.abandon(plan)
    cache.check_integrity()


def test_a_sharer_does_not_notice_an_abandoned_step():
    cache = make_cache()
    text = Words(cache.spec)
    first = cache.open()
    tokens = text.append(cache, first, [], words(200))
    second = cache.fork(first)
    before = books(cache)
    plan = cache.plan([(first, 60), (second, 7)])
    both = text.inputs(words(67, 4))
    append_some(cache, plan, both, 3)
    cache.abandon(plan)
    assert books(cache) == before
    for request, salt in ((second, 1), (first, 2)):
        mine = text.append(cache, request, tokens, words(70, salt))
        assert reachable_bytes(cache, request) == text.expected(cache, mine)


def others_actions(cache, text, tmp_path):
    """Everything that can be done to requests that are not in the step."""
    other = cache.open()
    tokens = text.append(cache, other, [], words(140, 5))
    cache.save(other, tmp_path / "a.dsv4kv")
    kept = cache.snapshot(other)
    return {
        "open": cache.open,
        "fork": lambda: cache.fork(other),
        "step": lambda: text.append(cache, other, tokens, words(150, 6)),
        "truncate": lambda: cache.truncate(other, other.seq_len - 2),
        "rewind": lambda: cache.rewind(other, kept),
        "snapshot": lambda: cache.snapshot(other),
        "restore": lambda: cache.restore(kept),
        "load": lambda: cache.load(tmp_path / "a.dsv4kv"),
        "close": lambda: cache.close(other),
        "release": lambda: cache.close(kept),
    }


def test_what_others_do_does_not_overtake_a_step(tmp_path):
    """One thing before each append; the step is committed, and every sequence is what it should be."""
    cache = make_cache(num_pages=24, max_requests=8)
    text = Words(cache.spec)
    request = cache.open()
    tokens = text.append(cache, request, [], words(120))
    actions = iter(others_actions(cache, text, tmp_path).values())
    for new in (4, 150, 1):
        plan = cache.plan([(request, new)])
        tokens = [*tokens, *words(new, 7)]
        given, begin = text.inputs(tokens), request.seq_len
        for layer, part in [(i, part) for i in range(3) for part in [part.value for part in cache.layers[i].parts]]:
            next(actions, lambda: None)()
            append(cache, layer, plan, **{part: given.cut(layer, part, begin, begin + new)})
            cache.check_integrity()
        cache.commit(plan)
    assert next(actions, None) is None
    cache.check_integrity(memory=True)
    assert reachable_bytes(cache, request) == text.expected(cache, tokens)


def test_two_steps_at_a_time():
    cache = make_cache()
    text = Words(cache.spec)
    requests = [cache.open(), cache.open()]
    plans = []
    for request in requests:  # the second is planned when the first holds its pages
        plans.append(cache.plan([(request, 140)]))
        append(cache, 0, plans[-1], window=text.inputs(words(140)).parts[0]["window"])
    for plan in plans:
        for layer in (1, 2):
            given, parts = text.inputs(words(140)), [part.value for part in cache.layers[layer].parts]
            append(cache, layer, plan, **{part: given.cut(layer, part, 0, 140) for part in parts})
    for plan, request in zip(reversed(plans), reversed(requests), strict=True):
        cache.commit(plan)
        assert reachable_bytes(cache, request) == text.expected(cache, words(140))
    cache.check_integrity(memory=True)


def test_a_plan_whose_pages_went_to_another_is_stale():
    cache = make_cache()
    text = Words(cache.spec)
    first, second = cache.open(), cache.open()
    plans = [cache.plan([(request, 3)]) for request in (first, second)]
    append_all(cache, plans[0], [(text.inputs(words(3)), 0, 3)])
    with pytest.raises(StalePlanError, match=r"counted on for Request\(req_id=1.*went to another"):
        append_all(cache, plans[1], [(text.inputs(words(3)), 0, 3)])
    cache.commit(plans[0])
    text.append(cache, second, [], words(3))


@pytest.mark.parametrize("action", ["fork", "snapshot", "truncate"])
def test_a_plan_whose_request_changed_is_stale(action):
    """A fork makes its last page a shared one, which the plan would write into."""
    cache = make_cache()
    text = Words(cache.spec)
    request = cache.open()
    tokens = text.append(cache, request, [], words(10))
    plan = cache.plan([(request, 3)])
    getattr(cache, action)(*([request, 9] if action == "truncate" else [request]))
    with pytest.raises(StalePlanError, match=r"expected one made after Request\(req_id=0"):
        append_all(cache, plan, [(text.inputs(tokens[:3]), 0, 3)])


@pytest.mark.parametrize("how", ["close", "rewind"])
def test_a_request_that_leaves_a_step_ends_it(how):
    """A client goes away in the middle of a batch: the others are planned again, from where they were."""
    cache = make_cache()
    text = Words(cache.spec)
    stays, leaves = cache.open(), cache.open()
    tokens = text.append(cache, stays, [], words(131))
    kept = cache.snapshot(leaves)
    plan = cache.plan([(stays, 140), (leaves, 140)])
    append_some(cache, plan, text.inputs(words(280)), 2)
    if how == "close":
        cache.close(leaves)
    else:
        cache.rewind(leaves, kept)
    cache.check_integrity()
    for action in (
        lambda: append(cache, 2, plan),
        lambda: cache.commit(plan),
        lambda: cache.layers[1].select(plan, None, None),
    ):
        with pytest.raises(StalePlanError, match="was closed or cut back; expected abandon"):
            action()
    cache.abandon(plan)
    tokens = text.append(cache, stays, tokens, words(140, 1))
    assert reachable_bytes(cache, stays) == text.expected(cache, tokens)
    if how == "rewind":
        tokens = text.append(cache, leaves, [], words(140, 2))
        assert reachable_bytes(cache, leaves) == text.expected(cache, tokens)
    cache.check_integrity(memory=True)


def test_what_cannot_be_abandoned():
    cache = make_cache()
    text = Words(cache.spec)
    request = cache.open()
    plan = cache.plan([(request, 4)])
    cache.abandon(plan)  # nothing was appended: it is as good as before
    append_all(cache, plan, [(text.inputs(words(4)), 0, 4)])
    cache.commit(plan)
    with pytest.raises(StalePlanError, match="got one that was committed or abandoned"):
        cache.abandon(plan)
    plan = cache.plan([(request, 4)])
    append_all(cache, plan, [(text.inputs(words(8)), 4, 8)])
    cache.abandon(plan)
    for action in (cache.abandon, cache.commit, lambda p: append_all(cache, p, [(text.inputs(words(4)), 0, 4)])):
        with pytest.raises(StalePlanError, match=r"over|abandoned"):
            action(plan)
    with pytest.raises(StalePlanError, match="another cache's"):
        make_cache().abandon(plan)
    feed(cache, [(request, text.inputs(words(8)), 4)])
    assert reachable_bytes(cache, request) == text.expected(cache, words(8))
