"""P4 under failures inside an operation: nothing is half done, or the object knows it and refuses the request.

A failure is an exception between two tensor operations: an allocation that fails, or an interrupt. It is raised at every place of
every operation; then the books and the memory are whole, and what is done again, or after it, leaves a cold run's bytes.
"""

from functools import partial
from itertools import count

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_dsv4.cache import CompressorWeights
from sglang_dsv4.cache.regions import Owner, Part
from sglang_dsv4.errors import CacheError, DamagedRequestError, StalePlanError
from tests.cache.driver import append, feed, reachable_bytes
from tests.cache.test_branching import DRAFT, Words, make_cache, words

BASE = 125  # what comes next closes CSA blocks, then an HCA block and the page
GOING_ON = 9
POISON = {True: float("nan"), False: 0xFF}  # of fp32 rows, and of the bytes of packed ones


class Injected(BaseException):
    """No `Exception`, as an interrupt is none."""


class FailAt(TorchDispatchMode):
    """Raises in place of tensor operation number ``n``."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise Injected(str(func))
        return func(*args, **(kwargs or {}))


def fails_at(n, action, *args):
    """Whether an action that is cut off at tensor operation ``n`` gets that far; its result if it ends before."""
    try:
        with FailAt(n):
            return False, action(*args)
    except Injected:
        return True, None


class World:
    """A cache with a snapshot of `BASE` tokens: each sequence restored from it copies the shared page before it writes."""

    def __init__(self, checks="off"):
        self.cache = make_cache(num_pages=12, checks=checks)
        self.text = Words(self.cache.spec)
        trunk = self.cache.open()
        self.tokens = self.text.append(self.cache, trunk, [], words(BASE))
        self.base = self.cache.snapshot(trunk)
        self.cache.close(trunk)
        self.nothing_held = self.books()
        self.poison_what_is_free()

    def books(self):
        """Who holds what; ids and the epoch, which only go up, aside."""
        books, pages = self.cache.requests, self.cache.requests.allocator
        held = [(r.seq_len, r.min_len, list(r.pages.history), list(r.pages.window)) for r in books.opened]
        free = [sorted(numbers.free) for numbers in (pages.history, pages.window, pages.slots)]
        return held, free, len(books.snapshots), len(books.under_way)

    def request(self):
        return self.cache.restore(self.base)

    def poison_what_is_free(self):
        """NaN in every free page and slot, so that nothing is right because somebody left the same there."""
        pages = self.cache.requests.allocator
        free = {
            Owner.HISTORY_PAGE: pages.history.free,
            Owner.WINDOW_PAGE: pages.window.free,
            Owner.STATE_SLOT: pages.slots.free,
        }
        for layer in self.cache.storage.layers:
            for stored in layer.regions:
                per_owner = stored.region.rows_per_owner
                rows = torch.tensor(free[stored.region.owner])[:, None] * per_owner + torch.arange(per_owner)
                stored.write(
                    rows.flatten(), torch.full_like(stored.read(rows.flatten()), POISON[stored.region.row_format is None])
                )

    def append(self, plan, parts):
        """Some parts of a step, all its requests getting the same words."""
        new = [word for item in plan.items for word in words(item.num_new_tokens, 3)]
        given = self.text.inputs(new)
        for layer_id, part in parts:
            append(self.cache, layer_id, plan, **{part.value: given.cut(layer_id, part.value, 0, len(new))})

    @property
    def parts(self):
        """Every part of a step."""
        return [(layer.layer_id, part) for layer in self.cache.layers for part in layer.parts]

    def step(self, request, new):
        """A step of ``new`` words that is appended and not committed."""
        plan = self.cache.plan([(request, new)])
        self.append(plan, self.parts)
        return plan

    def assert_whole(self, request, tokens):
        """It goes on as a cold run does; closed, it leaves nothing."""
        self.cache.check_integrity(memory=True)
        feed(self.cache, [(request, self.text.inputs([*tokens, *words(GOING_ON, 4)]), GOING_ON)])
        assert reachable_bytes(self.cache, request) == self.text.expected(self.cache, [*tokens, *words(GOING_ON, 4)])
        self.cache.close(request)
        assert self.books() == self.nothing_held
        self.poison_what_is_free()


def places(first, stride):
    """The ``first`` operations one by one, then every ``stride``-th."""
    return (n for n in count() if n < first or n % stride == 0)


@pytest.mark.parametrize("new", [DRAFT - 2, DRAFT + 1])  # without and with a copy of what it writes over
@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.long)])
def test_an_append_that_fails_is_taken_back(new, stride):
    world = World()
    cache = world.cache
    for index in range(len(world.parts)):
        before, part = world.parts[:index], world.parts[index : index + 1]
        first_of_layer = part[0][1] is Part.WINDOW  # holds pages, and copies
        for n in places(24 if first_of_layer else 1, stride):
            request = world.request()
            plan = cache.plan([(request, new)])
            world.append(plan, before)
            failed, _ = fails_at(n, world.append, plan, part)
            if not failed:
                cache.close(request)
                assert n > 20
                break
            cache.check_integrity(memory=True)
            with pytest.raises(StalePlanError, match="missing"):
                cache.commit(plan)
            cache.abandon(plan)
            world.assert_whole(request, world.tokens)


@pytest.mark.parametrize("then", ["commit", "abandon"])
def test_an_append_that_fails_is_done_again_or_refused(then):
    """Before its first write it can simply be called again; from then on only abandon helps."""
    world = World()
    cache, refused = world.cache, 0
    for n in places(24, 17):
        request = world.request()
        plan = cache.plan([(request, DRAFT + 1)])
        failed, _ = fails_at(n, world.append, plan, world.parts[1:2])
        if not failed:
            break
        tokens = world.tokens
        try:
            world.append(plan, world.parts[1:2])
        except StalePlanError as error:
            assert "layer 1 window: an append of it failed half way; expected abandon" in str(error)
            refused += 1
            cache.abandon(plan)
        else:
            world.append(plan, world.parts[:1] + world.parts[2:])
            getattr(cache, then)(plan)
            tokens = [*tokens, *words(DRAFT + 1, 3)] if then == "commit" else tokens
        world.assert_whole(request, tokens)
    assert 0 < refused < n


@pytest.mark.parametrize("then", ["abandon", "close", "rewind"])
def test_an_abandon_that_fails(then):
    """The step can be neither committed nor appended any more, and its requests wait for another abandon."""
    world = World()
    cache = world.cache
    for n in count():
        request, other = world.request(), world.request()
        plan = cache.plan([(request, DRAFT + 1), (other, 2)])
        world.append(plan, world.parts[:-1])
        failed, _ = fails_at(n, cache.abandon, plan)
        if not failed:
            assert n > 3
            break
        cache.check_integrity(memory=True)
        for action in (cache.commit, lambda p: world.append(p, world.parts[-1:])):
            with pytest.raises(StalePlanError, match="expected abandon"):
                action(plan)
        with pytest.raises(StalePlanError, match="expected commit, abandon or close first"):
            cache.plan([(request, 1)])
        if then == "close":
            cache.close(request)
            cache.abandon(plan)
        else:
            if then == "rewind":
                cache.rewind(request, world.base)
            cache.abandon(plan)
            cache.check_integrity(memory=True)
            plan = world.step(request, 1)
            cache.commit(plan)
            expected = world.text.expected(cache, [*world.tokens, *words(1, 3)])
            assert reachable_bytes(cache, request) == expected
            cache.close(request)
        world.assert_whole(other, world.tokens)


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("length", [0, BASE])
def test_a_rewind_that_fails(length, busy, tmp_path):
    """The request's stream state is of neither length: it is refused until another rewind, or closed."""
    world = World()
    cache, tokens = world.cache, world.tokens[:length]
    blank = cache.open()
    target = world.base if length else cache.snapshot(blank)  # of a slot that nobody has written
    cache.close(blank)
    world.nothing_held = world.books()
    for n in count():
        request, other = world.request(), world.request()
        cache.commit(world.step(request, DRAFT + 1))
        plan = cache.plan([(request, 2), (other, 2)])
        if busy:
            world.append(plan, world.parts)
        failed, _ = fails_at(n, cache.rewind, request, target)
        if not failed:
            assert n > 3
            break
        cache.check_integrity(memory=True)
        for action, *given in (
            (cache.plan, [(request, 1)]),
            (cache.fork, request),
            (cache.snapshot, request),
            (cache.truncate, request, request.seq_len),
            (cache.save, request, tmp_path / "a.dsv4kv"),
            (cache.commit, plan),
        ):
            with pytest.raises(DamagedRequestError, match=r"expected rewind or close first"):
                action(*given)
        if n % 2:
            cache.close(request)
        else:
            cache.rewind(request, target)
        if busy:
            cache.abandon(plan)
        if not n % 2:
            cache.commit(world.step(request, 4))
            assert reachable_bytes(cache, request) == world.text.expected(cache, [*tokens, *words(4, 3)])
            cache.close(request)
        world.assert_whole(other, world.tokens)


def kept(cache, request):
    cache.close(cache.snapshot(request))


CHANGE_NOTHING = {
    "fork": lambda cache, request, base, folder: cache.fork(request),
    "restore": lambda cache, request, base, folder: cache.restore(base),
    "load": lambda cache, request, base, folder: cache.load(folder / "saved.dsv4kv"),
    "snapshot": lambda cache, request, base, folder: kept(cache, request),
    "save": lambda cache, request, base, folder: cache.save(request, folder / "again.dsv4kv"),
    "plan": lambda cache, request, base, folder: cache.plan([(request, 130)]) and None,
    "check_integrity": lambda cache, request, base, folder: cache.check_integrity(memory=True),
}


@pytest.mark.parametrize(
    ("name", "checks"),
    [*((name, "off") for name in CHANGE_NOTHING), *((name, "memory") for name in ("fork", "restore", "load", "snapshot"))],
)
def test_a_failure_leaves_nothing_behind(name, checks, tmp_path):
    """With ``checks``, the operation may be done and its check fail: what it made is gone again."""
    world = World(checks)
    cache = world.cache
    saved = world.request()
    cache.save(saved, tmp_path / "saved.dsv4kv")
    cache.close(saved)
    files = sorted(tmp_path.rglob("*"))
    for n in places(8, 11 if checks == "off" else 29):
        request = world.request()
        before = world.books()
        failed, made = fails_at(n, CHANGE_NOTHING[name], cache, request, world.base, tmp_path)
        if not failed:
            assert n > 3
            break
        assert world.books() == before
        assert sorted(tmp_path.rglob("*")) == files
        cache.check_integrity(memory=True)
        world.assert_whole(request, world.tokens)
    if made is not None:
        cache.close(request)
        world.assert_whole(made, world.tokens)


OVER = {
    "commit": lambda cache, request, plan: cache.commit(plan),
    "abandon": lambda cache, request, plan: cache.abandon(plan),
    "close": lambda cache, request, plan: cache.close(request),
}


@pytest.mark.parametrize("name", OVER)
def test_a_check_that_fails_after_an_operation(name):
    """The operation is done, and says no more than that it cannot be done twice."""
    world = World("memory")
    cache = world.cache
    for n in (0, 1, 5):
        request = world.request()
        other = world.request()
        plan = world.step(request, 2)
        failed, _ = fails_at(n, OVER[name], cache, request, plan)
        assert failed
        with pytest.raises(CacheError):
            OVER[name](cache, request, plan)
        cache.close(other)
        if name != "close":
            world.assert_whole(request, [*world.tokens, *words(2, 3)] if name == "commit" else world.tokens)


def test_a_selection_that_fails_is_made_again():
    world = World()
    cache = world.cache
    request = world.request()
    plan = cache.plan([(request, 3)])
    world.append(plan, world.parts)
    generator = torch.Generator().manual_seed(0)
    q, weights = torch.randn(3, 4, 128, generator=generator), torch.rand(3, 4, generator=generator)
    expected = cache.layers[1].select(plan, q, weights)
    for n in count():
        failed, _ = fails_at(n, cache.layers[1].select, plan, q, weights)
        if not failed:
            assert n > 20
            break
        assert torch.equal(cache.layers[1].select(plan, q, weights), expected)
    cache.commit(plan)
    world.assert_whole(request, [*world.tokens, *words(3, 3)])


def test_a_binding_that_fails_changes_no_weights():
    world = World()
    cache = world.cache
    main, index = (world.text.table.parts[1][name].weights for name in ("main", "index"))
    other = CompressorWeights(main.slot_bias + 1, main.norm_weight * 2, 1e-3)
    for n in count():
        failed, _ = fails_at(n, partial(cache.layers[1].bind, main=other, index=index))
        if not failed:
            assert n > 0
            break
        request = world.request()
        plan = cache.plan([(request, 3)])
        given = world.text.inputs(words(3, 3))
        for layer_id, part in world.parts:
            cache.layers[layer_id].append(plan, **{part.value: given.cut(layer_id, part.value, 0, 3).values})
        cache.commit(plan)
        world.assert_whole(request, [*world.tokens, *words(3, 3)])
