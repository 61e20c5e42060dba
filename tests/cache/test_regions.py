"""The table of what a layer holds says what is read, and everybody who asks it looks at the same rows."""

import tempfile
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.cache.inspect.checksums import RowSums
from sglang_dsv4.cache.pages.tables import PageGrant, stack_tables
from sglang_dsv4.cache.regions import Kind, Owner, RegionTable, SequenceBatch
from sglang_dsv4.cache.storage import StoredRegion
from sglang_dsv4.errors import CacheInvariantError
from tests.cache.driver import FORMATS, feed, make_spec, reachable_bytes
from tests.cache.reads import NEXT, rows_read
from tests.cache.test_branching import DRAFT, Words, words

PAGES = st.sampled_from((128, 256))  # in a page of 128 the window of the next token covers all that the page holds
MEMORY = Path("/dev/shm")  # where there is one; hundreds of small files
# Around every edge: blocks of 4 and 128, pages of 128, the reach of the window, and how far a sequence may be cut back.
LENGTHS = st.one_of(
    st.integers(1, 520), st.builds(lambda page, near: page * 128 + near, st.integers(1, 4), st.integers(-6, 10))
)
CUTS = st.integers(0, DRAFT)


def make_world(seq_len, min_len, page_tokens, formats=("fp32", "fp32"), branches=1):
    """A cache, a sequence of these lengths in pages and a slot that others had before, and its text."""
    spec = make_spec(formats, page_tokens=page_tokens, max_draft_tokens=DRAFT)
    cache = CompressedKVCache(spec, num_pages=5 + branches * (seq_len // page_tokens + 2), max_requests=3 + branches)
    text = Words(spec)
    others = [cache.open() for _ in range(3)]
    feed(cache, [(other, text.inputs(words(count)), count) for other, count in zip(others, (3, 150, 2), strict=True)])
    cache.close(others[0]), cache.close(others[1])
    request, length = cache.open(), min(seq_len + DRAFT, min_len + DRAFT) if min_len else seq_len
    tokens = text.append(cache, request, [], words(length))
    cache.truncate(request, seq_len)
    assert (request.seq_len, request.min_len) == (seq_len, min_len)
    return cache, request, text, tokens[:seq_len]


def batch_of(cache, request):
    tables = stack_tables([(request.pages, PageGrant())], cache.device)
    return SequenceBatch([request.seq_len], [request.min_len], [request.state_slot], tables.history, tables.window)


def needed_rows(cache, request):
    """What the table says, by region."""
    batch = batch_of(cache, request)
    return {region.name: set(batch.needed(region).rows.tolist()) for region in cache.storage.table}


def all_stored(cache):
    return [stored for layer in cache.storage.layers for stored in layer.regions]


@contextmanager
def recording(method):
    """The rows that a method of `StoredRegion` is called with, by region."""
    found, stock = defaultdict(set), getattr(StoredRegion, method)

    def record(stored, rows):
        found[stored.region.name] |= set(rows.tolist())
        return stock(stored, rows)

    with mock.patch.object(StoredRegion, method, record):
        yield found


def lengths_of(seq_len, cut):
    """Of the sequence, and the shortest to which it may be cut back: 0 of one that never was longer than that."""
    return seq_len, max(0, seq_len - cut)


@settings(max_examples=25)
@given(seq_len=LENGTHS, cut=CUTS, page_tokens=PAGES)
@example(seq_len=131, cut=DRAFT, page_tokens=128)  # between the blocks beside a page boundary
@example(seq_len=450, cut=DRAFT, page_tokens=256)  # a page of which the window reaches a part
@example(seq_len=256, cut=0, page_tokens=128)
@example(seq_len=3, cut=3, page_tokens=256)
def test_what_is_read_is_looked_at_and_saved_and_copied(seq_len, cut, page_tokens):
    """Autograd's view of what the next tokens read, after every cut, is everybody's."""
    seq_len, min_len = lengths_of(seq_len, cut)
    cache, request, text, _ = make_world(seq_len, min_len, page_tokens)
    read = defaultdict(set)
    for length in range(min_len, seq_len + 1):
        for name, rows in rows_read(cache, request, length, text.inputs(words(NEXT, 3))).items():
            read[name] |= rows
    with recording("values") as looked_at:
        cache.check_integrity(memory=True)
    others = [other for other in cache.requests.opened if other is not request]
    for other in others:
        for name, rows in needed_rows(cache, other).items():
            looked_at[name] -= rows
    with recording("read") as saved, tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        cache.save(request, Path(folder) / "a.dsv4kv")
    with recording("values") as summed:
        RowSums(cache.storage.layers, cache.requests.allocator.capacity).digests(batch_of(cache, request))
    cache.fork(request)
    copies = cache.plan([(request, 1)]).copies
    page, is_shared = seq_len // page_tokens, seq_len % page_tokens != 0
    for region in cache.storage.table:
        name = region.name
        assert looked_at[name] == summed[name] == saved[name] == read[name], name
        assert len(read[name]) == sum(map(len, region.needed(seq_len, min_len))), f"{name}: two indices have one row"
        if region.owner is not Owner.STATE_SLOT:
            held = request.pages.history if region.owner is Owner.HISTORY_PAGE else request.pages.window
            expected = {row for row in read[name] if is_shared and row // region.rows_per_owner == held[page]}
            sources = copies.moves[region.places][0].tolist() if copies is not None else []
            assert set(sources) == expected, name


@settings(max_examples=15)
@given(seq_len=LENGTHS, cut=CUTS, page_tokens=PAGES, formats=st.sampled_from(FORMATS))
@example(seq_len=450, cut=DRAFT, page_tokens=256, formats=FORMATS[0])
def test_nothing_else_is_read(seq_len, cut, page_tokens, formats):
    """With NaN everywhere else, every cut of the sequence goes on to the bytes of a cold run."""
    seq_len, min_len = lengths_of(seq_len, cut)
    cache, request, text, tokens = make_world(seq_len, min_len, page_tokens, formats, branches=1 + DRAFT)
    for other in cache.requests.opened:
        if other is not request:
            cache.close(other)
    poison_all_but(cache, needed_rows(cache, request))
    cache.check_integrity(memory=True)
    new = words(130, 3)
    branches = [(cache.fork(request), tokens[:length]) for length in range(min_len, seq_len + 1)]
    for branch, kept in branches:
        cache.truncate(branch, len(kept))
    for count in (1, len(new) - 1):  # copy-on-write of all of them in one step, then what is left of them
        feed(cache, [(branch, text.inputs([*kept, *new]), count) for branch, kept in branches])
    cache.check_integrity(memory=True)
    cold = CompressedKVCache(cache.spec, num_pages=6 * (seq_len // page_tokens + 3), max_requests=6)
    fresh = [(cold.open(), [*kept, *new]) for _, kept in branches]
    feed(cold, [(one, text.inputs(both), len(both)) for one, both in fresh])
    for (branch, kept), (one, _) in zip(branches, fresh, strict=True):
        assert reachable_bytes(cache, branch) == reachable_bytes(cold, one), len(kept)


def poison_all_but(cache, rows):
    """NaN in all memory but these rows."""
    for layer in cache.storage.layers:
        kept = [(stored, torch.tensor(sorted(rows[stored.region.name]), dtype=torch.int64)) for stored in layer.regions]
        values = [stored.read(held).clone() for stored, held in kept]
        for stored, _ in kept:
            stored.tensor.view(torch.uint8).fill_(0xFF)  # NaN in every format
        for (stored, held), value in zip(kept, values, strict=True):
            stored.write(held, value)


@pytest.mark.parametrize(("seq_len", "cut"), [(16, 5), (130, 5), (300, 5), (300, 0), (259, 3)])
def test_a_needed_row_that_is_not_finite_is_named(seq_len, cut):
    """The first and the last row of everything that is needed, one at a time, also where only a cut would read it."""
    seq_len, min_len = lengths_of(seq_len, cut)
    cache, request, _, _ = make_world(seq_len, min_len, 128)
    for stored in all_stored(cache):
        region = stored.region
        for index in {index for r in region.needed(seq_len, min_len) for index in (r[0], r[-1])}:
            row = region.rows_of(batch_of(cache, request), [(range(index, index + 1),)]).rows
            good = stored.read(row).clone()
            spoilt = good.clone()
            spoilt.view(torch.uint8).fill_(0xFF)
            stored.write(row, spoilt)
            with pytest.raises(CacheInvariantError, match=rf"layer {region.layer_id}: .*{region.kind.value} {index}: "):
                cache.check_integrity(memory=True)
            stored.write(row, good)
    cache.check_integrity(memory=True)


def test_a_fork_keeps_what_a_roll_back_behind_it_reads():
    """Copy-on-write takes the rows that the shortest length needs, of a page that is wider than the window."""
    cache, request, text, tokens = make_world(450, 450 - DRAFT, 256, FORMATS[0])
    twin = cache.fork(request)
    text.append(cache, twin, tokens, words(1, 5))
    cache.truncate(twin, 446)
    assert reachable_bytes(cache, twin) == text.expected(cache, tokens[:446])
    both = text.append(cache, twin, tokens[:446], words(9, 6))
    assert reachable_bytes(cache, twin) == text.expected(cache, both)


@pytest.mark.parametrize("options", [{}, {"page_tokens": 128, "max_draft_tokens": DRAFT}])
@pytest.mark.parametrize("pages", [0, 1, 2, 5])
def test_a_cut_at_a_page_boundary(options, pages):
    """It needs all history pages before it and the last window page, boundary rows included, and no stream state."""
    spec = make_spec(**options)
    table = RegionTable(spec)
    seq_len = pages * spec.page_tokens
    assert table.page_cut(seq_len) == (range(pages), range(max(0, pages - 1), pages))
    for region in table:
        needed = region.needed(seq_len, seq_len)
        if region.owner is Owner.STATE_SLOT:
            assert needed == ()
        elif region.kind is Kind.BOUNDARY and pages:
            assert needed == (range((pages - 1) * region.rows_per_owner, pages * region.rows_per_owner),)
    with pytest.raises(ValueError, match=f"seq_len: expected a multiple of {spec.page_tokens}, a page boundary, got"):
        table.page_cut(seq_len + 1)


@settings(max_examples=100)
@given(seq_len=LENGTHS, cut=CUTS, page_tokens=PAGES)
def test_window_pages_are_those_of_needed_rows(seq_len, cut, page_tokens):
    """The first page that holds a needed row, and all later ones."""
    seq_len, min_len = lengths_of(seq_len, cut)
    table = RegionTable(make_spec(page_tokens=page_tokens, max_draft_tokens=DRAFT))
    regions = table.owned_by(Owner.WINDOW_PAGE)
    pages = {i // region.rows_per_owner for region in regions for r in region.needed(seq_len, min_len) for i in r}
    found = table.window_pages(seq_len, min_len)
    assert pages <= set(found)
    assert (found.start, found.stop) == (min(pages, default=table.num_pages(seq_len)), table.num_pages(seq_len))


def test_names_are_unique_and_bytes_are_those_of_the_storage():
    cache = CompressedKVCache(make_spec(), num_pages=2, max_requests=3, num_window_pages=4)
    table = cache.storage.table
    assert len({region.name for region in table}) == len(list(table)) == 11
    counts = {Owner.HISTORY_PAGE: 2, Owner.WINDOW_PAGE: 4, Owner.STATE_SLOT: 3}
    assert sum(table.bytes_of(owner) * count for owner, count in counts.items()) == sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.storage.layers
        for tensors in layer.tensors().values()
        for tensor in tensors
    )
