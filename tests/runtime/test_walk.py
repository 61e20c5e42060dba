"""Thousands of random operations: tokens are what was asked for, answers are right, no page is lost."""

import random

import pytest

from sglang_dsv4.errors import OutOfPagesError, TruncateError
from tests.runtime.worlds import assert_nothing_held, assert_right, make_runtime, make_tokens

STEPS = 2000
CHECK_EVERY = 250  # how often one answer is compared with a full forward

pytestmark = pytest.mark.long


class Walk:
    """Random operations on a runtime, beside a dictionary of what each handle should hold."""

    def __init__(self, runtime, oracle, seed):
        self.runtime, self.oracle = runtime, oracle
        self.random = random.Random(seed)
        self.handles, self.snapshots = {}, {}
        self.prompts = [make_tokens(n, salt=50) for n in (1, 4, 127, 128, 130, 257)]
        self.refused = 0

    def step(self):
        names = ["open", "fork", "truncate", "snapshot", "restore", "release", "batch", "clear"]
        names += ["close", "append", "generate"] * 3
        getattr(self, self.random.choice(names))()

    def pick(self, of):
        return self.random.choice(list(of)) if of else None

    def adopt(self, make, tokens):
        try:
            handle = make()
        except OutOfPagesError:
            self.refused += 1
            return
        self.handles[handle] = list(tokens)

    def open(self):
        tokens = list(self.pick(self.prompts))
        tokens += make_tokens(self.random.randrange(6), salt=self.random.randrange(3))
        self.adopt(lambda: self.runtime.open(tokens), tokens)

    def fork(self):
        handle = self.pick(self.handles)
        if handle is not None:
            self.adopt(handle.fork, self.handles[handle])

    def grow(self, handle, action):
        try:
            self.handles[handle] += action()
        except OutOfPagesError:
            self.refused += 1

    def append(self):
        handle = self.pick(self.handles)
        if handle is not None:
            tokens = make_tokens(self.random.choice([1, 2, 5, 40]), salt=60)
            self.grow(handle, lambda: (handle.append(tokens), tokens)[1])

    def generate(self):
        handle = self.pick([handle for handle in self.handles if self.handles[handle]])
        if handle is not None:
            n = self.random.choice([0, 1, 3])
            self.grow(handle, lambda: handle.generate(n, temperature=1.0, seed=1, stop=()).tokens)

    def batch(self):
        self.prompts.append(list(self.pick(self.prompts)[:130]))
        wanted = [self.pick(self.prompts), self.prompts.pop()]
        try:
            done = self.runtime.generate(wanted, 2, stop=(), progress=False)
        except OutOfPagesError:
            self.refused += 1
        else:
            assert [len(completion.tokens) for completion in done] == [2, 2]

    def truncate(self):
        handle = self.pick(self.handles)
        if handle is None:
            return
        n = len(self.handles[handle]) - self.random.randrange(10)
        try:
            handle.truncate(n)
        except TruncateError:
            assert n < handle.min_len
        else:
            del self.handles[handle][n:]

    def snapshot(self):
        handle = self.pick(self.handles)
        if handle is not None and len(self.snapshots) < 3:
            self.snapshots[handle.snapshot()] = list(self.handles[handle])

    def restore(self):
        kept = self.pick(self.snapshots)
        if kept is not None:
            self.adopt(lambda: self.runtime.restore(kept), self.snapshots[kept])

    def release(self):
        kept = self.pick(self.snapshots)
        if kept is not None:
            del self.snapshots[kept]  # nobody refers to it any more

    def close(self):
        handle = self.pick(self.handles)
        if handle is not None:
            del self.handles[handle]
            if self.random.random() < 0.5:
                handle.close()

    def clear(self):
        if self.random.random() < 0.1:
            self.runtime.engine.index.clear()

    def check(self, number):
        self.runtime.engine.collect()
        self.runtime.cache.check_integrity()
        held = self.runtime.cache.requests.opened
        assert len(held) == len(self.handles)
        assert {handle: list(handle.tokens) for handle in self.handles} == self.handles
        handle = self.pick([handle for handle in self.handles if self.handles[handle]])
        if number % CHECK_EVERY == 0 and handle is not None:
            twin = handle.fork() if len(held) < 5 else handle
            self.grow(twin if twin is handle else handle, lambda: handle.generate(0).tokens)
            if not handle.live().num_pending:
                assert_right(self.oracle, handle)


@pytest.mark.slow
def test_random_walk(small_checkpoint, small_oracle, seed):
    runtime = make_runtime(small_checkpoint, num_pages=11, max_requests=5, max_ends=6)
    walk = Walk(runtime, small_oracle, seed)
    for number in range(STEPS):
        walk.step()
        walk.check(number)
    assert walk.refused > 0, "it never ran out of anything"
    assert runtime.engine.index.counters.evictions > 0 and runtime.engine.index.counters.hits > 0
    walk.handles.clear()
    walk.snapshots.clear()
    assert_nothing_held(runtime)
