"""Any order of operations over several live sequences, and what their bytes must be."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dsv4_kernels.row_codec import naive_load_rows
from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.cache.regions import Kind, Part
from sglang_dsv4.errors import OutOfPagesError, StalePlanError, TruncateError
from tests.cache import fp64
from tests.cache.driver import FORMATS, append, feed, make_spec, reachable_bytes
from tests.cache.test_branching import Words, words

MAX_DRAFT = 5
PAGES = {128: 10, 256: 6}  # few enough that they run out
# Hundreds of small files, gone at the end: where there is one, in memory.
MEMORY = Path("/dev/shm")


class Oracle:
    """Bytes of a cold run of a token list in one format, which an independent computation in fp64 confirmed.

    A cold run is one forward in a cache of its own, with pages of 128 tokens and no draft room, whatever the machine has:
    the bytes must not depend on that either.
    """

    def __init__(self, formats):
        self.spec = make_spec(formats, page_tokens=128)
        self.text = Words(self.spec)
        self._known = {}

    def bytes_of(self, tokens):
        key = tuple(tokens)
        if key not in self._known:
            if len(self._known) > 500:
                self._known.clear()
            self._known[key] = self._run(tokens)
        return self._known[key]

    def _run(self, tokens):
        cache = CompressedKVCache(self.spec, num_pages=max(1, -(-len(tokens) // 128)), max_requests=1)
        request = cache.open()
        if tokens:
            feed(cache, [(request, self.text.inputs(tokens), len(tokens))])
            self.check_values(cache, request, tokens)
        return reachable_bytes(cache, request)

    def check_values(self, cache, request, tokens):
        """Entries and index keys against fp64."""
        inputs, spec = self.text.inputs(tokens), cache.spec
        history = torch.tensor(request.pages.history, dtype=torch.int64)
        for layer in cache.layers:
            kind, storage = layer.memory.layer, layer.memory.storage
            if not kind.ratio:
                continue
            per_page = spec.page_tokens // kind.ratio
            entries = torch.arange(request.num_entries(kind.ratio))
            rows = history[entries // per_page] * per_page + entries % per_page
            parts = inputs.parts[kind.layer_id]
            found = naive_load_rows(storage.pool, layer.memory.storage.num_window_rows + rows, spec.rows)
            expected = fp64.entries(parts["main"], kind, rotate=False)
            assert fp64.excess(found, expected, spec.rows) <= 0
            if kind.indexed:
                found = naive_load_rows(storage.tensor(Kind.INDEX_KEY, Part.INDEX), rows, spec.index_keys)
                expected = fp64.entries(parts["index"], kind, rotate=True)
                assert fp64.excess(found, expected, spec.index_keys) <= 0


class Step:
    """A step that is being appended, part by part, while other rules run."""

    def __init__(self, plan, requests, new, inputs):
        self.plan, self.requests, self.new = plan, requests, new
        self.inputs = inputs  # of the whole batch, new tokens only
        self.is_broken = False


picks = st.integers(0, 7)
salts = st.integers(0, 6)
counts = st.sampled_from([1, 2, 3, 4, 5, 6, 60, 127, 128, 131, 250])


class CacheMachine(RuleBasedStateMachine):
    """Rules pick among what there is; ``done`` counts what a rule really did, over all examples."""

    done: Counter = Counter()
    oracles: dict = {}

    @initialize(formats=st.sampled_from(FORMATS), page_tokens=st.sampled_from(sorted(PAGES)), draft=st.integers(0, MAX_DRAFT))
    def start(self, formats, page_tokens, draft):
        spec = make_spec(formats, page_tokens=page_tokens, max_draft_tokens=draft)
        self.cache = CompressedKVCache(spec, num_pages=PAGES[page_tokens], max_requests=4)
        if formats not in self.oracles:
            self.oracles[formats] = Oracle(formats)
        self.oracle = self.oracles[formats]
        self.tokens = {}  # by request
        self.snapshots, self.files = [], []  # each with its tokens
        self.step = None
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.saved = 0

    # What rules share.

    def count(self, name):
        self.done[name] += 1

    def request(self, pick):
        return list(self.tokens)[pick % len(self.tokens)]

    def is_busy(self, request):
        return self.step is not None and request in self.step.requests

    def refused_if_busy(self, request, action):
        """Whether the request is in a step that is being appended; then the action must be refused."""
        if self.is_busy(request):
            with pytest.raises(StalePlanError, match="expected commit, abandon or close first"):
                action()
            self.count("refused: in a step")
            return True
        return False

    def opened(self, name, make, tokens):
        try:
            request = make()
        except OutOfPagesError:
            self.count("refused: no room")
        else:
            self.tokens[request] = list(tokens)
            self.count(name)

    def inputs(self, items):
        """New tokens of several requests behind each other: of words, an input depends on the token alone."""
        return self.oracle.text.inputs([token for _, new in items for token in new])

    def begin(self, items, parts):
        """Plan a step and append its first parts; whether there was room."""
        try:
            plan = self.cache.plan([(request, len(new)) for request, new in items])
        except OutOfPagesError:
            self.count("refused: no room")
            return False
        given = self.inputs(items)
        self.step = Step(plan, [r for r, _ in items], dict(items), given)
        self.append_parts(parts)
        return True

    def append_parts(self, count):
        step = self.step
        todo = [(i, part) for i, layer in enumerate(self.cache.layers) for part in layer.parts]
        for layer, part in [key for key in todo if key not in step.plan.appended][:count]:
            given = step.inputs.cut(layer, part.value, 0, step.plan.num_tokens)
            append(self.cache, layer, step.plan, **{part.value: given})

    def finish(self):
        step, self.step = self.step, None
        self.cache.commit(step.plan)
        for request in step.requests:
            self.tokens[request] += step.new[request]

    def leaves(self, request):
        """A request is closed or cut back: a step that it is part of cannot be finished."""
        if self.is_busy(request):
            self.step.requests.remove(request)
            self.step.is_broken = True
            if not self.step.requests:
                self.step = None

    # Steps.

    @precondition(lambda self: self.tokens)
    @rule(pick=picks, new=st.builds(words, counts, salts))
    def extend(self, pick, new):
        request = self.request(pick)
        if self.refused_if_busy(request, lambda: self.cache.plan([(request, 1)])):
            return
        kept, self.step = self.step, None  # beside a step that is being appended
        if self.begin([(request, new)], parts=100):
            self.finish()
            self.count("extend")
        self.step = kept

    @precondition(lambda self: self.step is None and self.tokens)
    @rule(pick=picks, count=st.integers(1, 6), salt=salts)
    def decode(self, pick, count, salt):
        for token in words(count, salt):
            if self.begin([(self.request(pick), [token])], parts=100):
                self.finish()
                self.count("decode")

    @precondition(lambda self: self.step is None and self.tokens and self.cache.spec.max_draft_tokens)
    @rule(pick=picks, data=st.data(), salt=salts)
    def verify(self, pick, data, salt):
        """A draft of n tokens of which k are accepted."""
        request = self.request(pick)
        drafts = data.draw(st.integers(1, self.cache.spec.max_draft_tokens))
        accepted = data.draw(st.integers(0, drafts))
        if self.begin([(request, words(drafts, salt))], parts=100):
            before = request.seq_len
            self.finish()
            self.cache.truncate(request, before + accepted)
            del self.tokens[request][before + accepted :]
            self.count("verify")

    @precondition(lambda self: self.step is None and self.tokens)
    @rule(batch=st.lists(st.tuples(picks, st.builds(words, counts, salts)), min_size=1, max_size=3), parts=st.integers(1, 6))
    def begin_step(self, batch, parts):
        """A batch that other rules get in between of."""
        items = {self.request(pick): new for pick, new in batch}
        if self.begin(list(items.items()), parts):
            self.count("begin a step")

    @precondition(lambda self: self.step is not None)
    @rule(parts=st.integers(1, 6))
    def go_on(self, parts):
        step = self.step
        if step.is_broken:
            with pytest.raises(StalePlanError, match="expected abandon, then a new plan"):
                self.cache.commit(step.plan)
            self.count("refused: broken step")
            return
        self.append_parts(parts)
        if len(step.plan.appended) == sum(len(layer.parts) for layer in self.cache.layers):
            self.finish()
            self.count("finish a step")
        else:
            self.count("go on with a step")

    @precondition(lambda self: self.step is not None)
    @rule()
    def abandon(self):
        step, self.step = self.step, None
        self.cache.abandon(step.plan)
        self.count("abandon a broken step" if step.is_broken else "abandon a step")

    # Sequences.

    @precondition(lambda self: len(self.tokens) < 2)
    @rule()
    def open(self):
        self.opened("open", self.cache.open, [])

    @precondition(lambda self: self.tokens)
    @rule(pick=picks)
    def fork(self, pick):
        request = self.request(pick)
        if not self.refused_if_busy(request, lambda: self.cache.fork(request)):
            self.opened("fork", lambda: self.cache.fork(request), self.tokens[request])

    @precondition(lambda self: self.tokens)
    @rule(pick=picks, back=st.integers(0, MAX_DRAFT))
    def truncate(self, pick, back):
        request = self.request(pick)
        length = request.seq_len - back
        if self.refused_if_busy(request, lambda: self.cache.truncate(request, length)):
            return
        if length < request.min_len:
            with pytest.raises(TruncateError):
                self.cache.truncate(request, length)
            self.count("refused: truncate")
            return
        self.cache.truncate(request, length)
        del self.tokens[request][length:]
        self.count("truncate")

    @precondition(lambda self: self.tokens)
    @rule(pick=picks)
    def snapshot(self, pick):
        request = self.request(pick)
        if not self.refused_if_busy(request, lambda: self.cache.snapshot(request)):
            self.snapshots.append((self.cache.snapshot(request), list(self.tokens[request])))
            self.count("snapshot")

    @precondition(lambda self: self.snapshots)
    @rule(which=picks)
    def restore(self, which):
        kept, tokens = self.snapshots[which % len(self.snapshots)]
        self.opened("restore", lambda: self.cache.restore(kept), tokens)

    @precondition(lambda self: self.snapshots and self.tokens)
    @rule(pick=picks, which=picks)
    def rewind(self, pick, which):
        request = self.request(pick)
        kept, tokens = self.snapshots[which % len(self.snapshots)]
        self.leaves(request)
        self.cache.rewind(request, kept)
        self.tokens[request] = list(tokens)
        self.count("rewind")

    @precondition(lambda self: self.snapshots)
    @rule(which=picks)
    def release(self, which):
        self.cache.close(self.snapshots.pop(which % len(self.snapshots))[0])
        self.count("release")

    @precondition(lambda self: any(self.tokens.values()) and len(self.files) < 4)
    @rule(pick=picks)
    def save(self, pick):
        request, path = self.request(pick), self.folder / f"{self.saved}.dsv4kv"
        if not self.refused_if_busy(request, lambda: self.cache.save(request, path)):
            self.cache.save(request, path)
            self.files.append((path, list(self.tokens[request])))
            self.saved += 1
            self.count("save")

    @precondition(lambda self: self.files)
    @rule(which=picks)
    def load(self, which):
        path, tokens = self.files[which % len(self.files)]
        self.opened("load", lambda: self.cache.load(path), tokens)

    @precondition(lambda self: len(self.tokens) > 2)
    @rule(pick=picks)
    def close(self, pick):
        self.end(self.request(pick))
        self.count("close")

    @precondition(lambda self: min(self.free()) == 0 and (len(self.tokens) > 1 or self.snapshots))
    @rule()
    def evict(self):
        """Close the oldest and drop the oldest snapshot when something has run out, as an owner of the cache would."""
        if self.tokens:
            self.end(self.request(0))
        if self.snapshots:
            self.cache.close(self.snapshots.pop(0)[0])
        self.count("evict")

    def end(self, request):
        self.leaves(request)
        del self.tokens[request]
        self.cache.close(request)

    def free(self):
        counts = self.cache.requests.allocator.counts()
        return [counts[f"{kind}_free"] for kind in ("history_pages", "window_pages", "state_slots")]

    # What must hold after every rule.

    @invariant()
    def every_byte_is_a_cold_run_s(self):
        self.cache.check_integrity(memory=True)
        assert list(self.tokens) == list(self.cache.requests.opened)
        for request, tokens in self.tokens.items():
            assert request.seq_len == len(tokens)
            assert reachable_bytes(self.cache, request) == self.oracle.bytes_of(tokens), request

    def teardown(self):
        shutil.rmtree(self.folder)
