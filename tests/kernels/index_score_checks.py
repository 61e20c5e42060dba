"""Checks of the fused indexer against its reference, for Triton's CPU interpreter and for a GPU alike.

Run as a program it makes every check on the CPU and prints ``{check: "" or its fault}``.
"""

from dataclasses import replace
from unittest import mock

import torch

from dsv4_kernels.group_maxima import naive_group_maxima
from dsv4_kernels.group_maxima.fused import group_maxima
from dsv4_kernels.index_query import fused as index_query_fused
from dsv4_kernels.index_score import fused as index_score_fused
from dsv4_kernels.index_score.bound import score_bound
from dsv4_kernels.index_score.naive import naive_index_query, naive_topk_entries
from dsv4_kernels.index_score.tuning import IndexTuning
from dsv4_kernels.index_score.workspace import held_scores
from dsv4_kernels.index_topk.fused import GROUP, topk_entries, topk_levels
from dsv4_kernels.layout import BF16_INDEX, FP8_INDEX, FP32_INDEX, INDEX_DIM, INDEX_FORMATS
from tests.kernels.index_world import RATIO, K, exact_world, make_world
from tests.kernels.interpreting import make_checks

# Rows of `hard_scores`, and scores of each.
HARD, LENGTH = 12, 704


def query_faults(world, workspace, shift=0):
    """Scored tokens whose rotated queries are off by more than rounding; ``shift`` moves their positions."""
    tokens, heads = torch.nonzero(world.visible > K).flatten(), world.q.shape[1]
    positions = world.step.positions[tokens] + shift
    x = world.q[tokens].double()
    exact = naive_index_query(world.q[tokens], world.table[positions])
    # Two products and a sum, then seven sums and the scale, each to 2^-24 of its terms. The reference has as much.
    bound = 2 * 10 * 2.0**-24 * 2 * INDEX_DIM**-0.5 * x.abs().sum(-1, keepdim=True)
    found = workspace.query[tokens, :heads].double()
    scale = workspace.weights[tokens, :heads].double() / world.weights[tokens].double()
    assert (torch.frexp(scale).mantissa == 0.5).all(), "scales of queries: no power of two"
    if world.fmt is FP8_INDEX:
        # Four bits, the first included; below 2^-6 of a scale multiples of 2^-9 of it.
        bound = bound + torch.maximum(2.0**-4 * exact.abs(), 2.0**-10 * scale.unsqueeze(-1))
        largest = found.abs().amax(-1)
        assert ((largest > 208) & (largest <= 448)).all(), "a scale wastes bits"
    elif world.fmt is BF16_INDEX:
        bound = bound + 2.0**-8 * exact.abs()
    return int((~((found * scale.unsqueeze(-1) - exact).abs() <= bound)).sum())


def score_faults(world, workspace, *, relu=True, shift=0):
    """Scores off by more than rounding from fp64 over the rounded queries; twins leave the ReLU out or shift keys."""
    faults = 0
    for token in torch.nonzero(world.visible > K).flatten().tolist():
        keys = world.keys(token).roll(shift, 0)
        q = workspace.query[token, : world.q.shape[1]].double()
        weights = workspace.weights[token, : world.q.shape[1]].double()
        dots = q @ keys.T
        dots = dots.clamp_min(0) if relu else dots
        bound = score_bound(q, weights, keys, e4m3=world.fmt is FP8_INDEX)
        found = world.scores(workspace)[token, : len(keys)].double()
        faults += int((~((found - weights @ dots).abs() <= bound)).sum())
    return faults


def wrong_maxima(world, workspace):
    """Groups of a scored token whose maximum is not that of its visible scores."""
    held, faults = held_scores(world.step, RATIO, workspace), 0
    for token in torch.nonzero(world.visible > K).flatten().tolist():
        count = int(world.visible[token])
        scores = held.scores[token].clone()
        scores[count:] = float("-inf")
        expected = scores.view(-1, GROUP).amax(1)[: -(-count // GROUP)]
        faults += int((held.maxima[token, : len(expected)] != expected).sum())
    return faults


def check_values(device="cpu"):
    """Queries and scores against fp64, the choice against the reference over the same scores; and the twins."""
    for fmt in INDEX_FORMATS.values():
        for dtype in (torch.float32, torch.bfloat16):
            world = make_world(fmt, device=device, dtype=dtype)
            out, workspace = world.fused()
            assert query_faults(world, workspace) == 0, f"{fmt.name}: query"
            assert query_faults(world, workspace, shift=1) > 0, f"{fmt.name}: a wrong position"
            assert score_faults(world, workspace) == 0, f"{fmt.name}: score"
            assert score_faults(world, workspace, relu=False) > 0, f"{fmt.name}: no ReLU"
            assert score_faults(world, workspace, shift=1) > 0, f"{fmt.name}: another key"
            assert wrong_maxima(world, workspace) == 0, f"{fmt.name}: maxima"
            chosen = naive_topk_entries(world.scores(workspace), world.visible, K)
            assert torch.equal(out, world.rows_of(chosen)), f"{fmt.name}: choice"


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


def check_scores_do_not_depend_on_tiling(device="cpu"):
    """The bytes of a score are those of its request alone; exact values where the interpreter's order is not ours."""
    for fmt in INDEX_FORMATS.values():
        make = exact_world if device == "cpu" else make_world
        world = make(fmt, device=device)
        whole = world.scores(world.fused(tuning=IndexTuning(64, 1, 4, 2, 4))[1])
        for tuning in (IndexTuning(64, 4, 4, 1, 1), IndexTuning(64, 2, 4, 2, 2)):
            scores = world.scores(world.fused(tuning=tuning)[1])
            for token, count in enumerate(world.visible.tolist()):
                if count > K:
                    same = torch.equal(whole[token, :count], scores[token, :count])
                    assert same, f"{fmt.name}: token {token}, {tuning}"


def hard_scores(device):
    """Rows of scores with many ties, zeros of both signs, subnormals, infinities, and every bit of a float in play."""
    generator = torch.Generator().manual_seed(5)
    length = LENGTH
    rows = [
        torch.zeros(length),
        torch.where(torch.arange(length) % 3 == 0, 0.0, -0.0),
        torch.randint(0, 3, (length,), generator=generator) - 1.0,
        torch.randn(length, generator=generator),
        -torch.rand(length, generator=generator),
        torch.randn(length, generator=generator) * 1e-40,
        torch.randint(0, 2, (length,), generator=generator) * float("inf"),
        -torch.randint(0, 2, (length,), generator=generator) * float("inf"),
        torch.arange(length).float(),
        torch.arange(length).flip(0).float(),
        torch.arange(length) // 7 * 1.0,
        1.0 + torch.randint(0, 40, (length,), generator=generator) * 2.0**-23,
    ]
    scores = torch.stack(rows).nan_to_num(0.0, float("inf"), float("-inf"))
    return scores.repeat(5, 1).to(device)


def check_topk(device="cpu"):
    """The choice alone, over hard scores, by one, two and three levels; nothing past the visible scores is read."""
    scores = hard_scores(device)
    length = scores.shape[1]
    world = make_world(FP32_INDEX, ((RATIO * length, 1),), heads=1, device=device)
    table = world.step.history_pages[:, : RATIO * length // 128].expand(len(scores), -1)
    visible = torch.tensor([length, 513, 65, 17, 333], device=device).repeat_interleave(HARD)
    tokens = torch.arange(len(scores), device=device)
    step = replace(world.step, positions=visible * RATIO - 1, token_rows=tokens, history_pages=table.contiguous())
    hidden = torch.arange(length, device=device) >= visible.unsqueeze(1)
    scores = scores.masked_fill(hidden, float("nan"))
    maxima = scores.masked_fill(hidden, float("-inf")).unflatten(1, (-1, GROUP)).amax(2)
    maxima[hidden[:, ::GROUP]] = float("nan")
    for k, levels in ((K, 2), (2, 3), (88, 1), (K - 3, 2)):
        expected = replace(world, step=step).rows_of(naive_topk_entries(scores, visible, k))
        chosen = naive_topk_entries(scores[:HARD], visible[:HARD], k)
        backwards = length - 1 - naive_topk_entries(scores[:HARD].flip(1), visible[:HARD], k).flip(1)
        assert (backwards != chosen).any(1).sum() >= 6, "rows where the rule for ties matters"
        assert topk_levels(length, k)[2] == levels
        wide = torch.full((len(scores), k + 3), 7, dtype=torch.int32, device=device)
        groups = torch.full((len(scores), k), -1, dtype=torch.int32, device=device)
        for first, count in ((0, 25), (25, len(scores) - 25)):
            part = slice(first, first + count)
            topk_entries(step, scores[part], maxima[part], first, RATIO, wide[:, :k], groups)
        assert (wide[:, k:] == 7).all(), f"k {k}: more than k were chosen"
        assert torch.equal(wide[:, :k], expected), f"k {k}"


def check_levels(device="cpu"):
    """Rows of one, two and three levels next to shorter ones, from queries to rows."""
    for fmt in INDEX_FORMATS.values():
        world = exact_world(fmt, device=device)
        for k, levels in ((24, 1), (K, 2), (2, 3)):
            assert topk_levels(world.max_entries, k)[2] == levels
            out, _ = world.fused(k=k)
            assert torch.equal(out, world.naive(k=k)), f"{fmt.name}: k {k}"


def check_many_units(device="cpu"):
    """Several times more units than are counted at once."""
    world = exact_world(FP8_INDEX, device=device)
    with mock.patch.object(index_query_fused, "COUNTED_UNITS", 4), mock.patch.object(index_score_fused, "COUNTED_UNITS", 4):
        out, _ = world.fused(tuning=IndexTuning(64, 1, 4, 1, 1))
    assert torch.equal(out, world.naive())


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


def check_maxima(device="cpu"):
    """The maxima of scores that another kernel wrote; groups without a visible score, and short rows, are left alone."""
    scores = hard_scores(device)
    visible = torch.tensor([LENGTH, 513, 65, 17, 333], device=device).repeat_interleave(HARD)
    hidden = torch.arange(LENGTH, device=device) >= visible.unsqueeze(1)
    scores = scores.masked_fill(hidden, float("inf"))  # a maximum passes over NaN
    found, expected = torch.full((2, len(scores), LENGTH // GROUP), 7.0, device=device)
    positions = torch.cat([visible[:1], visible * RATIO - 1])
    for fewest in (0, 65):
        found.fill_(7.0), expected.fill_(7.0)
        group_maxima(positions, 1, RATIO, scores, found, fewest)
        naive_group_maxima(scores, visible, GROUP, expected)
        expected[visible <= fewest] = 7.0
        assert torch.equal(found, expected) and (found == 7.0).any(), f"fewest {fewest}"
    naive_group_maxima(scores.roll(1, 1), visible, GROUP, expected)
    assert not torch.equal(found, expected)


CHECKS = {
    "maxima": check_maxima,
    "values": check_values,
    "exact": check_exact,
    "tiling": check_scores_do_not_depend_on_tiling,
    "topk": check_topk,
    "levels": check_levels,
    "many units": check_many_units,
    "numbering": check_numbering,
    "cells behind": check_cells_behind,
}


if __name__ == "__main__":
    make_checks(CHECKS)
