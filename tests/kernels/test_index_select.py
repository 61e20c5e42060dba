"""The choice whole, from queries to rows: the reference against fp64, the kernels against the reference, refusals, capture."""

from dataclasses import replace

import pytest
import torch

from dsv4_kernels.index_query import naive_round_query
from dsv4_kernels.index_score.tuning import IndexTuning
from dsv4_kernels.index_score.workspace import index_workspace
from dsv4_kernels.index_select import naive_select_entries
from dsv4_kernels.index_select.fused import select_entries
from dsv4_kernels.index_topk import naive_topk_entries
from dsv4_kernels.index_topk.tuning import topk_levels
from dsv4_kernels.layout import BF16_INDEX, FP8_INDEX, FP32_INDEX, INDEX_DIM, INDEX_FORMATS
from tests.kernels.index_world import FEW, RATIO, K, exact_world, make_world
from tests.kernels.interpreting import interpreted_checks


def hadamard_matrix():
    rows = torch.arange(INDEX_DIM)
    bits = rows.unsqueeze(1) & rows
    parity = sum((bits >> i) & 1 for i in range(7)) % 2
    return (1.0 - 2.0 * parity).double() / INDEX_DIM**0.5


@pytest.mark.parametrize("fmt", INDEX_FORMATS.values(), ids=INDEX_FORMATS)
def test_matches_fp64(fmt):
    """Token by token in fp64; a choice may differ only where scores are closer than rounding explains."""
    world = make_world(fmt, requests=((300, 1), (60, 9), (0, 3), (127, 4)))
    out, matrix = world.naive(), hadamard_matrix()
    num_chosen = 0
    for token, position in enumerate(world.step.positions.tolist()):
        count = (position + 1) // RATIO
        if count == 0:
            assert (out[token] == -1).all()
            continue
        q = world.q[token].double()
        cos, sin = world.table[position].double().split(32)
        pairs = torch.view_as_complex(q[:, 64:].reshape(-1, 32, 2).contiguous())
        turned = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(1)
        q = torch.cat([q[:, :64], turned], 1) @ matrix
        q = naive_round_query(q.float(), fmt).double()
        keys = world.keys(token)
        scores = world.weights[token].double() @ (q @ keys.T).clamp_min(0)
        rows = world.step.entry_slots(world.step.token_rows[token], torch.arange(count), RATIO)
        found = out[token][out[token] >= 0].tolist()
        assert len(found) == min(K, count) and (out[token, len(found) :] == -1).all()
        chosen = torch.tensor([row in found for row in rows.tolist()])
        assert [row for row in rows.tolist() if row in found] == found, "not in the entries' order"
        if count > K:
            # A query that rounds the other way moves a dot by the last bit of one product; so does a tie between scores.
            last_bit = {FP8_INDEX: 2.0**-4, BF16_INDEX: 2.0**-8, FP32_INDEX: 2.0**-20}[fmt]
            slack = last_bit * (q.abs().amax() * keys.abs().amax() * world.weights[token].abs().sum())
            assert scores[chosen].min() >= scores[~chosen].max() - slack
            assert not scores.flip(0)[chosen].min() >= scores.flip(0)[~chosen].max() - slack
            num_chosen += 1
    assert num_chosen >= 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": 31}, "workspace: expected room for 32 scores, got 31"),
        ({"heads": 17}, "workspace: expected 16 padded heads, got 32"),
    ],
)
def test_a_workspace_that_does_not_fit_is_refused(change, message):
    world = make_world(BF16_INDEX, requests=((0, 3),), heads=2)
    step = replace(world.step, history_pages=world.step.history_pages[:, :1])
    sizes = {"scores": 32, "heads": 2} | change
    workspace = index_workspace(8, sizes["scores"], sizes["heads"], K, BF16_INDEX, world.q.device)
    out = torch.full((len(world.q), K), 7, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        select_entries(step, world.q, world.weights, world.pool, world.fmt, world.table, RATIO, out, workspace)
    assert (out == 7).all()


def test_no_tokens():
    world = make_world(BF16_INDEX, requests=((0, 3),), heads=2)
    none = torch.zeros(0, dtype=torch.int64)
    step = replace(world.step, positions=none, token_rows=none)
    out = torch.full((0, K), 7, dtype=torch.int32)
    arguments = (step, world.q[:0], world.weights[:0], world.pool, world.fmt, world.table, RATIO, out)
    naive_select_entries(*arguments)
    select_entries(*arguments, world.workspace())


def check_small(device="cpu"):
    """Where scores are exact, and tied, the choice is the reference's; a wrong weight is seen."""
    for fmt in INDEX_FORMATS.values():
        world = exact_world(fmt, requests=FEW, device=device)
        expected = world.naive()
        assert torch.equal(world.fused()[0], expected), fmt.name
        world.weights[0] *= -1
        assert not torch.equal(world.naive(), expected), f"{fmt.name}: a wrong weight was not seen"


def check_exact(device="cpu"):
    """Where scores are exact, and tied, the choice is the reference's: for any tiling, and any pieces of the step."""
    for fmt in INDEX_FORMATS.values():
        world = exact_world(fmt, device=device)
        expected = world.naive()
        for entries, unit, max_tokens in ((32, 1, 64), (32, 4, 7), (64, 8, 64), (16, 2, 64)):
            out, _ = world.fused(world.workspace(max_tokens), IndexTuning(entries, unit, 4, 1, 1))
            assert torch.equal(out, expected), f"{fmt.name}: {entries} entries, {unit} tokens, {max_tokens}"
        world.weights[5] *= -1
        assert not torch.equal(world.naive(), expected), f"{fmt.name}: a wrong weight was not seen"


def check_own_scores(device="cpu"):
    """The choice among the kernel's own scores is the reference's over them."""
    for fmt in INDEX_FORMATS.values():
        world = make_world(fmt, device=device)
        out, workspace = world.fused()
        chosen = naive_topk_entries(world.scores(workspace), world.visible, K)
        assert torch.equal(out, world.rows_of(chosen)), fmt.name


def check_levels(device="cpu"):
    """Rows of one, two and three levels next to shorter ones, from queries to rows."""
    for fmt in INDEX_FORMATS.values():
        world = exact_world(fmt, device=device)
        for k, levels in ((24, 1), (K, 2), (2, 3)):
            assert topk_levels(world.max_entries, k)[2] == levels
            out, _ = world.fused(k=k)
            assert torch.equal(out, world.naive(k=k)), f"{fmt.name}: k {k}"


def check_numbering(device="cpu"):
    """Chosen entries by other tables than the keys': the same entries, few and many, by the reference and the kernels."""
    world = exact_world(FP8_INDEX, device=device)
    table = torch.arange(world.step.history_pages.numel(), device=device)
    pages = table.view_as(world.step.history_pages)
    numbering = replace(world.step, history_pages=pages, num_window_rows=77)
    chosen = world.entries_of(world.naive())
    expected = replace(world, step=numbering).rows_of(chosen)
    assert not torch.equal(expected, world.naive())
    assert torch.equal(world.naive(numbering=numbering), expected)
    found, _ = world.fused(numbering=numbering)
    assert torch.equal(found, expected)
    found, _ = world.fused(world.workspace(max_tokens=3), numbering=numbering)
    assert torch.equal(found, expected), "in pieces"


def check_cells_behind(device="cpu"):
    """Without padding nothing is written behind a token's entries, and the entries are the same."""
    world = exact_world(FP8_INDEX, device=device)
    padded, _ = world.fused()
    bare, _ = world.fused(pad=False)
    behind = torch.arange(K, device=device) >= world.visible.unsqueeze(1)
    assert (bare[behind] == 7).all() and (padded[behind] == -1).all() and behind.any()
    assert torch.equal(bare[~behind], padded[~behind])


DECODE = tuple((length, 1) for length in (0, 3, 2047, 2048, 5000, 40_000, 70_001, 9))
MIXED = ((2100, 1), (5000, 4), (2048, 300), (0, 40), (66_000, 33))
TUNINGS = (IndexTuning(64, 1, 4, 4, 4), IndexTuning(64, 2, 4, 3, 2), IndexTuning(128, 2, 4, 3, 2))


def same_scores(world, one, other, k):
    return all(
        torch.equal(world.scores(one)[token, :count], world.scores(other)[token, :count])
        for token, count in enumerate(world.visible.tolist())
        if count > k
    )


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", INDEX_FORMATS.values(), ids=INDEX_FORMATS)
@pytest.mark.parametrize("requests", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(("heads", "k"), [(64, 512), (8, 1024)])
def test_real_sizes(fmt, requests, heads, k):
    """The choice among the kernel's own scores, which do not depend on the tiling or on the pieces of a step."""
    options = {"device": "cuda", "page_tokens": 256, "dtype": torch.bfloat16}
    world = make_world(fmt, requests, heads, **options)
    results = [world.fused(tuning=tuning, k=k) for tuning in TUNINGS]
    out, workspace = results[0]
    chosen = naive_topk_entries(world.scores(workspace), world.visible, k)
    assert torch.equal(out, world.rows_of(chosen))
    for other_out, other in results[1:]:
        assert same_scores(world, workspace, other, k) and torch.equal(out, other_out)
    pieces, _ = world.fused(world.workspace(max_tokens=5, k=k), k=k)
    assert torch.equal(pieces, out)
    again, _ = world.fused(k=k)
    assert torch.equal(again, out), "a second run differs: a race"


@pytest.mark.gpu
def test_a_captured_call_follows_its_inputs():
    first, second = (make_world(BF16_INDEX, device="cuda", seed=seed) for seed in (1, 2))
    expected, workspace = second.fused()
    out = torch.full_like(expected, 7)
    arguments = (first.step, first.q, first.weights, first.pool, first.fmt, first.table, 4, out, workspace)
    select_entries(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select_entries(*arguments)
    for name in ("q", "weights", "pool"):
        getattr(first, name).copy_(getattr(second, name))
    for name in ("positions", "token_rows", "history_pages"):
        getattr(first.step, name).copy_(getattr(second.step, name))
    assert not torch.equal(out, expected)
    graph.replay()
    assert torch.equal(out, expected)


SMALL = (check_small, check_numbering)
CHECKS = (check_exact, check_own_scores, check_levels, check_cells_behind)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")
