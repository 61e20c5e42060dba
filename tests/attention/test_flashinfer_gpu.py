"""FlashInfer attention on a GPU against fp64: lists, lengths, heads, sinks, unread memory, graphs, chunks, a million tokens."""

import importlib
from dataclasses import replace

import pytest
import torch

from dsv4_kernels.layout import FP8_584_ROW
from dsv4_kernels.row_codec import naive_load_rows
from dsv4_kernels.sparse_attention.bound import exact, worst
from sglang_dsv4.attention import FixedShape, row_list_kinds
from sglang_dsv4.check.attention_work import AttentionCase, AttentionWork
from sglang_dsv4.errors import UnsupportedError

pytestmark = [pytest.mark.gpu, pytest.mark.flashinfer]

SCALE = 512**-0.5
# Lists of 1, 2, 63, 64, 65, 128, 640 and, of 1,024 entries, 1,152 rows, and around.
STARTS = (0, 1, 62, 63, 64, 127, 300, 2047, 8191)
FIXED = FixedShape(12, 8192)


def make(work, schedule="own", backend="auto", fixed=None, prefill="flashinfer"):
    attention = importlib.import_module("sglang_dsv4.attention.flashinfer").FlashInferAttention
    options = {"schedule": schedule, "backend": backend, "fixed": fixed, "prefill": prefill}
    return attention(work.cache, work.case.heads, **options)


def make_work(kind, heads=64, row_format="bf16", starts=STARTS, extends=None, topk=512, seed=0):
    extends = (1,) * len(starts) if extends is None else extends
    case = AttentionCase(kind, starts, extends, heads, topk)
    work = AttentionWork(case, 2, row_format, torch.device("cuda"), seed)
    for layer_id in range(2):
        forget_unlisted(work, layer_id)
    return work


def forget_unlisted(work, layer_id):
    """NaN in every row that no query lists."""
    listed = work.indices(layer_id)
    pool = work.cache.layers[layer_id].pool
    if work.cache.spec.rows is FP8_584_ROW:
        return  # its rows share groups with others; the gather's own check has NaN beside them
    unlisted = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
    unlisted[listed[listed >= 0]] = False
    pool[unlisted] = float("nan")


def expect(work, layer_id, query, sink=None):
    table = work.cache.layers[layer_id].rope_table
    angles = table[work.plan.step.positions[query]]
    sink = work.sink if sink is None else sink
    return exact(work.q[layer_id][query], work.rows(layer_id, query), sink, SCALE, angles)


def run(attention, work, layer_id, sink=None):
    sink = work.sink if sink is None else sink
    chosen = work.selected_by(layer_id, attention.numbering)
    return attention.run(work.cache.layers[layer_id], work.q[layer_id], sink, chosen, undo_rope=True)


def errors(found, work, layer_id, sink=None):
    return [worst(found[i], expect(work, layer_id, i, sink)) for i in range(work.case.num_tokens)]


class Known:
    """Lengths by which some queries in the middle are padding."""

    def __init__(self, positions):
        self.positions = lambda: positions


def backends():
    return ["fa2", "fa3"] if torch.cuda.get_device_capability()[0] == 9 else ["fa2"]


@pytest.mark.parametrize("schedule", ["own", "whole", "stock"])
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_matches_fp64(kind, heads, schedule):
    for backend in backends():
        work = make_work(kind, heads, topk=1024 if heads == 128 else 512)
        attention = make(work, schedule, backend)
        attention.begin(work.plan, work.lengths)
        for layer_id in (1, 0):
            found = errors(run(attention, work, layer_id), work, layer_id)
            assert max(found) <= 1, (backend, layer_id, found)


@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_packed_rows_match_fp64(kind):
    work = make_work(kind, row_format="fp8_584")
    attention = make(work)
    attention.begin(work.plan, work.lengths)
    assert max(errors(run(attention, work, 1), work, 1)) <= 1


def test_a_lost_key_is_noticed():
    work = make_work("csa")
    attention = make(work)
    attention.begin(work.plan, work.lengths)
    last = len(STARTS) - 1
    for column in range(0, 512, 37):
        lost = work.selected[1].clone()
        lost[last, column] = lost[last, (column + 1) % 512]  # one row twice, one not at all
        found = attention.run(work.cache.layers[1], work.q[1], work.sink, lost, undo_rope=True)
        assert worst(found[last], expect(work, 1, last)) > 1, column


@pytest.mark.parametrize("schedule", ["own", "stock"])
def test_sinks(schedule):
    work = make_work("csa")
    attention = make(work, schedule)
    attention.begin(work.plan, work.lengths)
    sink = work.sink.clone()
    sink[0], sink[1] = float("inf"), float("-inf")
    found = run(attention, work, 0, sink)
    assert not found[:, 0].any()
    assert max(errors(found[:, 1:], _without_first_head(work), 0, sink[1:])) <= 1


def _without_first_head(work):
    for layer_id in range(2):
        work.q[layer_id] = work.q[layer_id][:, 1:]
    return work


@pytest.mark.parametrize("row_format", ["bf16", "fp8_584"])
def test_selected_rows_may_be_int64_and_a_view(row_format):
    work = make_work("csa", row_format=row_format)
    attention = make(work)
    attention.begin(work.plan, work.lengths)
    first = run(attention, work, 0)
    wide = work.selected[0].long().repeat_interleave(2, 0)[::2]
    assert torch.equal(attention.run(work.cache.layers[0], work.q[0], work.sink, wide, undo_rope=True), first)


def test_selected_rows_can_be_written_in_place():
    work = make_work("csa")
    attention = make(work)
    attention.begin(work.plan, work.lengths)
    expected = run(attention, work, 1)
    attention.begin(work.plan, work.lengths)
    place = attention.selected_buffer(work.cache.layers[1])
    assert place.shape == (len(STARTS), 512)
    counts = work.kind.num_entries(work.plan.step.positions).tolist()
    for query, count in enumerate(counts):
        place[query, :count] = work.selected[1][query, :count]
    before = place.clone()
    found = attention.run(work.cache.layers[1], work.q[1], work.sink, place, undo_rope=True)
    assert torch.equal(found, expected) and torch.equal(place, before)
    place[-1, :-1] = place[-1, 1:].clone()  # a lost key, to show that these were read
    assert not torch.equal(attention.run(work.cache.layers[1], work.q[1], work.sink, place, undo_rope=True), expected)


@pytest.mark.parametrize(("kind", "heads"), [("csa", 64), ("hca", 64), ("csa", 128)])
@pytest.mark.parametrize("schedule", ["own", "whole"])
def test_a_query_alone_gives_what_it_gives_in_a_batch(schedule, kind, heads):
    """Cut nowhere: the same bits. Cut by a schedule that sees the batch: within what is allowed of the same fp64 value."""
    last = (1 << 17) - 1 if kind == "hca" else 8191
    work = make_work(kind, heads, starts=(last,) * 40)
    attention = make(work, schedule)
    attention.begin(work.plan, work.lengths)
    together, step = run(attention, work, 0), work.plan.step
    same = []
    for begin, end in ((3, 4), (0, 2), (5, 38)):
        part = replace(step, positions=step.positions[begin:end], token_rows=step.token_rows[begin:end])
        attention.begin(replace(work.plan, step=part), work.lengths)
        chosen = None if work.selected[0] is None else work.selected[0][begin:end]
        found = attention.run(work.cache.layers[0], work.q[0][begin:end], work.sink, chosen, undo_rope=True)
        same.append(torch.equal(found, together[begin:end]))
        expected = expect(work, 0, begin)
        assert worst(found[0], expected) <= 1 and worst(together[begin], expected) <= 1
    assert all(same) if schedule == "whole" else not all(same)


def test_whole_queries_and_another_prefill_are_refused_together():
    with pytest.raises(UnsupportedError, match="prefill flashmla: expected schedule own or stock"):
        make(make_work("window"), "whole", prefill="flashmla")


def pad(work, fixed, fill):
    """The work's plan with queries of position -1 behind, in tensors that can be written to again."""
    missing = fixed.num_tokens - work.case.num_tokens
    step = work.plan.step
    device = step.positions.device
    step = replace(
        step,
        positions=torch.cat([step.positions, torch.full((missing,), -1, device=device)]),
        token_rows=torch.cat([step.token_rows, torch.zeros(missing, dtype=torch.int64, device=device)]),
    )
    q = [torch.cat([q, torch.full((missing, *q.shape[1:]), fill, device=device).to(q.dtype)]) for q in work.q]
    selected = [
        None if chosen is None else torch.cat([chosen, chosen.new_full((missing, chosen.shape[1]), -1)])
        for chosen in work.selected
    ]
    return replace(work.plan, step=step), q, selected


@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
@pytest.mark.parametrize("schedule", ["own", "stock"])
@pytest.mark.parametrize("heads", [64, 128])
def test_graph_replays_with_other_lengths(kind, schedule, heads):
    """Captured once; between replays positions change and queries turn into padding, and the stock planner plans again."""
    work = make_work(kind, heads)
    plan, q, selected = pad(work, FIXED, 3.0)
    attention = make(work, schedule, fixed=FIXED)
    lengths = work.lengths
    stock = schedule == "stock"

    def attend():
        return [attention.run(work.cache.layers[i], q[i], work.sink, selected[i], undo_rope=True) for i in range(2)]

    attention.begin(plan, lengths)
    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if not stock:
            attention.begin(plan)
        found = attend()
    for seed in range(3):
        order = torch.randperm(work.case.num_tokens, generator=torch.Generator().manual_seed(seed))
        kept = order[: work.case.num_tokens - seed].tolist()
        rest = [i for i in range(FIXED.num_tokens) if i not in kept]
        fresh, _, fresh_selected = pad(work, FIXED, 3.0)
        positions = fresh.step.positions.clone()
        positions[rest] = -1
        plan.step.positions.copy_(positions)
        if stock:
            for _ in range(2):  # the pinned buffer is written again while it may still be copied
                attention.begin(plan, Known(positions.cpu()))
        for tensor in found:
            tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for layer_id in range(2):
            assert not found[layer_id][rest].any(), (seed, layer_id)
            assert max(worst(found[layer_id][i], expect(work, layer_id, i)) for i in kept) <= 1


def test_the_host_planner_is_refused_in_a_capture():
    work = make_work("window")
    plan, _, _ = pad(work, FIXED, 0.0)
    attention = make(work, "stock", fixed=FIXED)
    attention.begin(plan, work.lengths)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ValueError, match="expected no capture of its stream"), torch.cuda.graph(graph):
        attention.begin(plan, work.lengths)


@pytest.mark.parametrize("schedule", ["own", "stock"])
@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
@pytest.mark.parametrize("row_format", ["bf16", "fp8_584"])
def test_prefill_in_chunks(kind, schedule, row_format, monkeypatch):
    monkeypatch.setattr(row_list_kinds, "MAX_CHUNK_TOKENS", 100)
    work = make_work(kind, row_format=row_format, starts=(1000, 0, 700), extends=(150, 201, 1))
    attention = make(work, schedule)
    attention.begin(work.plan, work.lengths)
    found = run(attention, work, 1)
    assert max(errors(found, work, 1)) <= 1
    monkeypatch.undo()
    attention.begin(work.plan, work.lengths)
    assert max(errors(run(attention, work, 1), work, 1)) <= 1


@pytest.mark.parametrize("schedule", ["own", "stock"])
def test_a_chunk_as_long_as_the_planner_takes(schedule):
    work = make_work("csa", starts=(0,), extends=(row_list_kinds.MAX_CHUNK_TOKENS + 3,))
    attention = make(work, schedule)
    attention.begin(work.plan, work.lengths)
    found = run(attention, work, 0)
    for query in (0, 511, 4096, 8190, 8191, 8192, 8194):
        assert worst(found[query], expect(work, 0, query)) <= 1, query


@pytest.mark.parametrize("schedule", ["own", "stock"])
def test_mixed_lengths(schedule):
    """Decode of long contexts beside a prefill: one query has as many keys as all the others."""
    work = make_work("hca", starts=(500_000, 3, 130, 0), extends=(1, 1, 70, 1))
    attention = make(work, schedule)
    attention.begin(work.plan, work.lengths)
    assert max(errors(run(attention, work, 1), work, 1)) <= 1


def test_a_million_tokens_and_a_pool_beyond_32_bits():
    case = AttentionCase("csa", ((1 << 20) - 1,) * 20, (1,) * 20)
    work = AttentionWork(case, 1, "bf16", torch.device("cuda"))
    assert work.cache.layers[0].pool.numel() > 1 << 31
    work.q, work.selected = work.q * 2, work.selected * 2
    assert int(work.selected[0].max()) * 512 > 1 << 31
    for schedule in ("own", "stock"):
        attention = make(work, schedule)
        attention.begin(work.plan, work.lengths)
        assert max(errors(run(attention, work, 0), work, 0)) <= 1
    longest = AttentionWork(AttentionCase("hca", ((1 << 20) - 1, 5), (1, 1)), 2, "bf16", torch.device("cuda"))
    attention = make(longest)
    attention.begin(longest.plan, longest.lengths)
    assert max(errors(run(attention, longest, 1), longest, 1)) <= 1


def test_no_queries():
    work = make_work("csa")
    step = work.plan.step
    none = replace(step, positions=step.positions[:0], token_rows=step.token_rows[:0])
    attention = make(work)
    attention.begin(replace(work.plan, step=none), work.lengths)
    out = attention.run(work.cache.layers[0], work.q[0][:0], work.sink, work.selected[0][:0])
    assert out.shape == (0, 64, 512)


def test_rows_are_what_the_reference_lists():
    """The twin of `expect`: the same comparison with one query's rows for another's fails."""
    work = make_work("csa", starts=(8191, 8190))
    attention = make(work)
    attention.begin(work.plan, work.lengths)
    found = run(attention, work, 0)
    pool = work.cache.layers[0].pool
    rows = naive_load_rows(pool, work.indices(0)[1], work.cache.spec.rows)
    table = work.cache.layers[0].rope_table
    other = exact(work.q[0][0], rows, work.sink, SCALE, table[work.plan.step.positions[0]])
    assert worst(found[0], other) > 1
