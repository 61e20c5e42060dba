"""The cache on a GPU, filled by the fused kernels: P1 in every cut, and values next to the PyTorch operations."""

import random

import pytest
import torch

from dsv4_kernels.row_codec import naive_load_rows
from sglang_dsv4.cache import CompressedKVCache
from tests.cache.driver import FORMATS, append_all, feed, make_spec, random_sequence, reachable_bytes

pytestmark = pytest.mark.gpu
LENGTH = 700


def make_cache(spec, kernels="auto"):
    return CompressedKVCache(spec, num_pages=40, max_requests=6, device="cuda", checks="memory", kernels=kernels)


def cold_bytes(spec, sequence, length):
    cache = make_cache(spec)
    assert cache.kernels.name == "triton"
    request = cache.open()
    feed(cache, [(request, sequence, length)])
    return reachable_bytes(cache, request)


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_every_cut_gives_the_bytes_of_a_cold_run(formats, draft):
    """Chunks, decode steps, forks, roll-backs, snapshots and abandoned steps in random order, several requests a step."""
    spec = make_spec(formats, max_draft_tokens=draft)
    sequences = [random_sequence(spec, LENGTH, seed).to("cuda") for seed in range(3)]
    rng = random.Random(draft)
    cache = make_cache(spec)
    live = [(cache.open(), sequence) for sequence in sequences]
    for _ in range(60):
        request, sequence = rng.choice(live)
        action = rng.random()
        if action < 0.1 and len(live) < 6:
            live.append((cache.fork(request), sequence))
        elif action < 0.2:
            cache.truncate(request, rng.randint(request.min_len, request.seq_len))
        elif action < 0.3:
            count = min(rng.randint(1, 9), LENGTH - request.seq_len)
            plan = cache.plan([(request, count)])
            append_all(cache, plan, [(sequence, request.seq_len, request.seq_len + count)])
            cache.abandon(plan)
        else:
            most = rng.choice([1, 1, 4, 130, 300])
            chosen = rng.sample(live, rng.randint(1, len(live)))
            items = [(request, sequence, min(rng.randint(1, most), LENGTH - request.seq_len)) for request, sequence in chosen]
            feed(cache, items)
    for request, sequence in live:
        assert reachable_bytes(cache, request) == cold_bytes(spec, sequence, request.seq_len), request
    other = cold_bytes(spec, sequences[1], live[0][0].seq_len)
    assert reachable_bytes(cache, live[0][0]) != other


def test_values_are_those_of_the_torch_operations():
    """Exact rows: what differs is the rounding of exponentials, below 2^-15 of a row (see `tests.kernels.flush_checks`)."""
    spec = make_spec(("fp32", "fp32"))
    sequence = random_sequence(spec, LENGTH).to("cuda")
    pools = []
    for kernels in ("triton", "torch"):
        cache = make_cache(spec, kernels)
        request = cache.open()
        feed(cache, [(request, sequence, LENGTH)])
        pools.append((cache, request))
    for ours, theirs in zip(pools[0][0].layers, pools[1][0].layers, strict=True):
        ratio = ours.ratio
        if ratio:
            per_page = spec.page_tokens // ratio
            entries = torch.arange(LENGTH // ratio, device="cuda")
            history = torch.tensor(pools[0][1].pages.history, device="cuda")
            assert pools[0][1].pages.history == pools[1][1].pages.history
            rows = history[entries // per_page] * per_page + entries % per_page
            rows = rows + pools[0][0].storage.num_window_rows
            found = naive_load_rows(ours.pool, rows, spec.rows)
            expected = naive_load_rows(theirs.pool, rows, spec.rows)
            bound = 2.0**-15 * expected.abs().amax(1, keepdim=True)
            assert ((found - expected).abs() <= bound).all()
            assert ((found - expected.roll(1, 0)).abs() > bound).any(), "another entry would pass"


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_select_chooses_what_the_torch_operations_choose(formats):
    """The same rows but for entries whose scores are nearer than their rounding."""
    spec = make_spec(formats)
    sequence = random_sequence(spec, LENGTH).to("cuda")
    generator = torch.Generator(device="cuda").manual_seed(1)
    index_q = torch.randn(LENGTH, 8, 128, device="cuda", generator=generator)
    weights = torch.rand(LENGTH, 8, device="cuda", generator=generator)
    chosen = []
    for kernels in ("triton", "torch"):
        cache = make_cache(spec, kernels)
        request = cache.open()
        plan = cache.plan([(request, LENGTH)])
        append_all(cache, plan, [(sequence, 0, LENGTH)])
        chosen.append(cache.layers[1].select(plan, index_q, weights).long())
    for ours, theirs in zip(*(rows.tolist() for rows in chosen), strict=True):
        assert [row for row in ours if row >= 0] == sorted(row for row in ours if row >= 0)
        assert len(set(ours) - {-1}) == len(set(theirs) - {-1})
    same = (chosen[0].sort(1).values == chosen[1].sort(1).values).float().mean().item()
    assert same > 0.98, f"only {100 * same:.2f} % of the chosen rows agree"


def test_scratch_is_in_the_report():
    cache = make_cache(make_spec(("bf16", "bf16")))
    held = cache.report().bytes_by_pool
    assert held["scratch"] == cache.kernels.nbytes > 0
    assert cache.report().total_bytes == sum(held.values())
