"""P1: the bytes of every entry, index key and window row do not depend on how a sequence was cut."""

import random

import pytest
import torch

from dsv4_kernels.step import StepTensors
from sglang_dsv4.cache import Capacity, CompressedKVCache, ExternalKVCache
from sglang_dsv4.cache.regions import Kind
from tests.cache.driver import FORMATS, append_all, feed, make_spec, random_sequence, reachable_bytes, table_bytes

NEAR = [length + delta for length in (128, 256, 384) for delta in range(-5, 6)]
LENGTHS = sorted({*range(1, 21), *NEAR, *random.Random(1).sample(range(21, 700), 6)})
LONGEST = max(LENGTHS)


def make_cache(spec, requests=1):
    pages = requests * (-(-LONGEST // spec.page_tokens))
    return CompressedKVCache(spec, num_pages=pages, max_requests=requests)


@pytest.fixture(scope="module", params=FORMATS, ids="-".join)
def case(request):
    """Spec, inputs, and the bytes that one full forward of each length gives."""
    spec = make_spec(request.param)
    sequence = random_sequence(spec, LONGEST)
    full = {}
    for length in LENGTHS:
        cache = make_cache(spec)
        handle = cache.open()
        feed(cache, [(handle, sequence, length)])
        cache.check_integrity(memory=True)
        full[length] = reachable_bytes(cache, handle)
    return spec, sequence, full


def test_full_forwards_agree_on_their_common_entries(case):
    """An entry depends on no token after its block."""
    spec, _, full = case
    for length, found in full.items():
        for layer in spec.layers:
            if layer.ratio and not spec.rows.scale_bytes:  # fp8 bytes are read back as all data, then all scales
                stored = found[layer.layer_id, "entries"]
                assert len(stored) == length // layer.ratio * spec.rows.row_bytes
                assert full[LONGEST][layer.layer_id, "entries"].startswith(stored), (length, layer.layer_id)


def test_token_by_token(case):
    """All lengths at once: every step is a batch of requests at the same position, fewer each time."""
    spec, sequence, full = case
    cache = make_cache(spec, len(LENGTHS))
    handles = {length: cache.open() for length in LENGTHS}
    for position in range(LONGEST):
        feed(cache, [(handle, sequence, 1) for length, handle in handles.items() if length > position])
    cache.check_integrity(memory=True)
    for length, handle in handles.items():
        assert reachable_bytes(cache, handle) == full[length], length


@pytest.mark.parametrize("seed", range(3))
def test_random_chunks_in_random_batches(case, seed):
    """Prefill chunks, single tokens and empty shares, mixed in one batch in changing order."""
    spec, sequence, full = case
    rng = random.Random(seed)
    cache = make_cache(spec, len(LENGTHS))
    open_ = [(length, cache.open()) for length in LENGTHS]
    running = list(open_)
    while running:
        rng.shuffle(running)
        batch = running[: rng.randint(1, len(running))]
        items = [
            (handle, sequence, min(length - handle.seq_len, rng.choice([0, 1, 1, 2, 3, 4, 5, 7, 64, 127, 128, 200, 300])))
            for length, handle in batch
        ]
        feed(cache, items)
        running = [(length, handle) for length, handle in running if handle.seq_len < length]
    cache.check_integrity(memory=True)
    for length, handle in open_:
        assert reachable_bytes(cache, handle) == full[length], length


def test_two_chunks_around_a_page_boundary(case):
    """The last block of a page comes half from each chunk, and the block after it closes in the second."""
    spec, sequence, full = case
    cuts = [(first, second) for first in range(251, 262) for second in (1, 4, 9)]
    cache = CompressedKVCache(spec, num_pages=2 * len(cuts), max_requests=len(cuts))
    handles = [cache.open() for _ in cuts]
    for begin in range(0, len(cuts), 11):  # in batches that fit the memory of a small machine
        batch = list(zip(handles, cuts, strict=True))[begin : begin + 11]
        for step in range(3):
            counts = [(first, second, 389 - first - second)[step] for _, (first, second) in batch]
            feed(cache, [(h, sequence, n) for (h, _), n in zip(batch, counts, strict=True)])
    for handle, cut in zip(handles, cuts, strict=True):
        assert reachable_bytes(cache, handle) == full[389], cut


@pytest.mark.parametrize("seed", range(2))
def test_after_a_prefix_hit(case, seed):
    """A request that starts at a page boundary over somebody else's pages, in a state row that held another request."""
    spec, sequence, full = case
    rng = random.Random(seed)
    page_tokens = spec.page_tokens
    lengths = [length for length in LENGTHS if length > page_tokens]
    pages = 4 + 4 * len(lengths)
    cache = ExternalKVCache(spec, Capacity(pages, pages, 2, 1024))
    other = random_sequence(spec, LONGEST, seed=99)

    def run(inputs, slot, begin, end, table):
        history = torch.tensor([table])
        plan = cache.plan(
            StepTensors(
                positions=torch.arange(begin, end),
                token_rows=torch.zeros(end - begin, dtype=torch.int64),
                seq_lens=torch.tensor([end]),
                extend_lens=torch.tensor([end - begin]),
                state_slots=torch.tensor([slot]),
                history_pages=history,
                window_pages=history,
                page_tokens=cache.spec.page_tokens,
                num_window_rows=cache.storage.num_window_rows,
            )
        )
        append_all(cache, plan, [(inputs, begin, end)])

    prefix = [0, 1, 2, 3]
    run(sequence, 0, 0, 512, prefix)  # whoever computed the prefix
    run(other, 1, 0, 339, [4, 5, 6, 7])  # leaves three tokens of an open block, and an HCA accumulator, in state row 1
    for index, length in enumerate(lengths):
        hit = (length - 1) // page_tokens * page_tokens
        own = [4 + 4 * index + k for k in range(4)]
        table = prefix[: hit // page_tokens] + own
        position = hit
        while position < length:
            step = min(length - position, rng.choice([1, 3, 4, 50, 300]))
            run(sequence, 1, position, position + step, table)
            position += step
        found = table_bytes(cache, length, torch.tensor(table), torch.tensor(table))
        assert found == full[length], length


def test_without_boundary_state_the_first_entry_after_a_hit_is_wrong(case):
    """The twin: the same hit with the boundary state lost must differ, in exactly the first new entry."""
    spec, sequence, full = case
    cache = ExternalKVCache(spec, Capacity(8, 8, 2, 1024))

    def run(slot, begin, end):
        table = torch.tensor([[0, 1, 2, 3]])
        plan = cache.plan(
            StepTensors(
                positions=torch.arange(begin, end),
                token_rows=torch.zeros(end - begin, dtype=torch.int64),
                seq_lens=torch.tensor([end]),
                extend_lens=torch.tensor([end - begin]),
                state_slots=torch.tensor([slot]),
                history_pages=table,
                window_pages=table,
                page_tokens=cache.spec.page_tokens,
                num_window_rows=cache.storage.num_window_rows,
            )
        )
        append_all(cache, plan, [(sequence, begin, end)])

    run(0, 0, 256)
    for layer in cache.layers:
        for part in layer.parts[1:] if len(layer.parts) == 3 else ():
            layer.memory.tensor(Kind.BOUNDARY, part).zero_()
    run(1, 256, 261)
    table = torch.tensor([0, 1])
    found = table_bytes(cache, 261, table, table)
    assert found[1, "entries"] != full[261][1, "entries"]
    assert found[1, "index keys"] != full[261][1, "index keys"]
    assert found[2, "entries"] == full[261][2, "entries"]  # HCA has nothing pending at a page boundary


def test_reusing_a_slot_leaves_no_trace(case):
    """A prompt shorter than a block, in the state row of a long one: the first entry must not see the old rows."""
    spec, sequence, full = case
    cache = make_cache(spec)
    first = cache.open()
    feed(cache, [(first, random_sequence(spec, 383, seed=5), 383)])
    cache.close(first)
    second = cache.open()
    assert second.state_slot == first.state_slot
    for count in (3, 1, 4, 120):
        feed(cache, [(second, sequence, count)])
    assert reachable_bytes(cache, second) == full[128]
