"""Any order of operations over several live sequences, against a dictionary of token lists.

After every step that writes, each open sequence's bytes equal those of a cold run of its tokens; at the end of each
example its entries equal an independent computation in fp64; the books are checked after every operation.
``make stress-cache`` runs the long profile.
"""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from dsv4_kernels.row_codec import naive_load_rows
from sglang_dsv4.errors import OutOfPagesError, TruncateError
from tests.cache import fp64
from tests.cache.driver import reachable_bytes
from tests.cache.test_branching import DRAFT, Words, make_cache, words

# Examples, steps in each at most, and steps that must have run in all.
PROFILES = {"repeatable": (20, 30, 200), "long": (1000, 50, 20_000)}


class CacheMachine(RuleBasedStateMachine):
    """Rules skip what the drawn handle cannot do: it may have been closed by another rule."""

    requests = Bundle("requests")
    snapshots = Bundle("snapshots")
    files = Bundle("files")
    steps_run = 0

    @initialize(draft=st.sampled_from([0, DRAFT]))
    def start(self, draft):
        self.cache = make_cache(num_pages=10, max_requests=4, draft=draft)
        self.text = Words(self.cache.spec)
        self.tokens = {}
        self.folder = Path(tempfile.mkdtemp())
        self.saved = 0

    def lives(self, request):
        return request is not None and request.req_id in self.tokens

    def opened(self, make, tokens):
        try:
            request = make()
        except OutOfPagesError:
            return None
        self.tokens[request.req_id] = list(tokens)
        return request

    def append(self, request, new):
        """Whether there was room."""
        tokens = self.tokens[request.req_id]
        try:
            self.tokens[request.req_id] = self.text.append(self.cache, request, tokens, new)
        except OutOfPagesError:
            return False
        for other in self.cache.ledger.requests:  # a writer must not touch what it shares
            self.check_bytes(other)
        return True

    @rule(target=requests)
    def open(self):
        return self.opened(self.cache.open, [])

    @rule(
        request=requests,
        count=st.sampled_from([1, 2, 3, 4, 5, 60, 127, 128, 131]),
        salt=st.integers(0, 6),
    )
    def extend(self, request, count, salt):
        if self.lives(request):
            self.append(request, words(count, salt))

    @rule(request=requests, count=st.integers(1, 6), salt=st.integers(0, 6))
    def decode(self, request, count, salt):
        if self.lives(request):
            for token in words(count, salt):
                self.append(request, [token])

    @rule(
        request=requests,
        drafts=st.integers(1, DRAFT),
        accepted=st.integers(0, DRAFT),
        salt=st.integers(0, 6),
    )
    def verify(self, request, drafts, accepted, salt):
        """A draft of n tokens of which k are accepted."""
        if self.lives(request) and self.cache.spec.max_draft_tokens and accepted <= drafts:
            before = request.seq_len
            if self.append(request, words(drafts, salt)):
                self.cache.truncate(request, before + accepted)
                del self.tokens[request.req_id][before + accepted :]

    @rule(target=requests, request=requests)
    def fork(self, request):
        if self.lives(request):
            return self.opened(lambda: self.cache.fork(request), self.tokens[request.req_id])
        return None

    @rule(request=requests, back=st.integers(0, DRAFT))
    def truncate(self, request, back):
        if self.lives(request):
            length = request.seq_len - back
            if length < request.min_len:
                with pytest.raises(TruncateError):
                    self.cache.truncate(request, length)
                return
            self.cache.truncate(request, length)
            del self.tokens[request.req_id][length:]

    @rule(target=snapshots, request=requests)
    def snapshot(self, request):
        if self.lives(request):
            return self.cache.snapshot(request), list(self.tokens[request.req_id])
        return None

    @rule(target=requests, kept=snapshots)
    def restore(self, kept):
        return None if kept is None else self.opened(lambda: self.cache.restore(kept[0]), kept[1])

    @rule(request=requests, kept=snapshots)
    def rewind(self, request, kept):
        if kept is not None and self.lives(request):
            self.cache.truncate(request, kept[0])
            self.tokens[request.req_id] = list(kept[1])

    @rule(kept=consumes(snapshots))
    def release(self, kept):
        if kept is not None:
            self.cache.release(kept[0])

    @rule(target=files, request=requests)
    def save(self, request):
        if self.lives(request):
            self.saved += 1
            path = self.folder / f"{self.saved}.dsv4kv"
            self.cache.save(request, path)
            return path, list(self.tokens[request.req_id])
        return None

    @rule(target=requests, file=files)
    def load(self, file):
        return None if file is None else self.opened(lambda: self.cache.load(file[0])[0], file[1])

    @rule(request=consumes(requests))
    def close(self, request):
        if self.lives(request):
            del self.tokens[request.req_id]
            self.cache.close(request)

    @rule()
    def evict(self):
        """Close the oldest when nothing is free, as an owner of the cache would."""
        if self.cache.pages.counts()["state_slots_free"] == 0:
            oldest = self.cache.ledger.requests[0]
            del self.tokens[oldest.req_id]
            self.cache.close(oldest)

    def check_bytes(self, request):
        tokens = self.tokens[request.req_id]
        assert request.seq_len == len(tokens)
        assert reachable_bytes(self.cache, request) == self.text.expected(self.cache, tokens)

    def check_values(self, request):
        inputs = self.text.inputs(self.tokens[request.req_id])
        history = torch.tensor(request.pages.history, dtype=torch.int64)
        for cache in self.cache.layers:
            layer, storage = cache.layer, cache.storage
            if layer.ratio:
                per_page = self.cache.spec.page_tokens // layer.ratio
                count = torch.arange(request.num_entries(layer.ratio))
                rows = history[count // per_page] * per_page + count % per_page
                parts = inputs.parts[layer.layer_id]
                found = naive_load_rows(
                    storage.pool, cache.num_window_rows + rows, self.cache.spec.rows
                )
                expected = fp64.entries(parts["main"], layer, rotate=False)
                assert fp64.excess(found, expected, fp64.BF16) <= 0
                if layer.indexed:
                    found = naive_load_rows(storage.index_pool, rows, self.cache.spec.index_keys)
                    expected = fp64.entries(parts["index"], layer, rotate=True)
                    assert fp64.excess(found, expected, fp64.BF16) <= 0

    @invariant()
    def is_intact(self):
        if hasattr(self, "cache"):
            self.cache.check_integrity()
            CacheMachine.steps_run += 1

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.check_integrity(memory=True)
            for request in self.cache.ledger.requests:
                self.check_bytes(request)
                self.check_values(request)
            shutil.rmtree(self.folder)


examples, steps, MIN_STEPS = PROFILES[settings.get_current_profile_name()]
TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=examples, stateful_step_count=steps, deadline=None
)


def test_enough_steps_were_run():
    """After `TestCacheMachine`, in the order of this file: a machine whose rules all skip would prove nothing."""
    print(f"{CacheMachine.steps_run} steps")
    assert CacheMachine.steps_run >= MIN_STEPS


def test_the_fp64_reference_notices_a_wrong_entry():
    """The twin of `CacheMachine.check_values`."""
    machine = CacheMachine()
    machine.start(0)
    request = machine.opened(machine.cache.open, [])
    machine.append(request, words(300))
    machine.check_values(request)
    layer = machine.cache.layers[1]
    row = layer.num_window_rows + request.pages.history[1] * 32 + 3
    stored = layer.storage.pool[row].clone()
    for damage in (stored * 1.03, stored.roll(1), layer.storage.pool[row - 1]):
        layer.storage.pool[row] = damage
        with pytest.raises(AssertionError):
            machine.check_values(request)
    layer.storage.pool[row] = stored
    machine.teardown()
