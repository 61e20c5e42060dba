"""The reference of `select_entries`, computed another way; and what the launcher refuses."""

from dataclasses import replace

import pytest
import torch

from dsv4_kernels.index_score.fused import select_entries
from dsv4_kernels.index_score.naive import naive_index_query, naive_round_query, naive_select_entries
from dsv4_kernels.index_score.tuning import rows_together
from dsv4_kernels.index_score.workspace import index_workspace
from dsv4_kernels.index_topk import GROUP, topk_entries
from dsv4_kernels.layout import BF16_INDEX, FP8_INDEX, FP32_INDEX, INDEX_DIM, INDEX_FORMATS
from dsv4_kernels.row_codec import naive_load_rows, naive_store_rows
from tests.kernels.index_world import RATIO, K, make_world


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


def test_queries_are_rounded_as_keys_are():
    q, table = torch.randn(5, 3, INDEX_DIM), torch.randn(5, 64)
    plain = naive_index_query(q, table)
    for fmt in INDEX_FORMATS.values():
        rounded = naive_index_query(q, table, fmt)
        pool = torch.zeros(fmt.pool_shape(15), dtype=fmt.storage_dtype)
        naive_store_rows(pool, torch.arange(15), plain.view(15, -1), fmt)
        stored = naive_load_rows(pool, torch.arange(15), fmt).float().view_as(rounded)
        assert torch.equal(rounded, stored)
        assert torch.equal(rounded, plain) == (fmt is FP32_INDEX)


def test_a_tile_lies_in_two_parts_at_most():
    assert rows_together(64, FP8_INDEX, 128) == 64 and rows_together(64, FP8_INDEX, 32) == 32
    assert rows_together(96, BF16_INDEX, 64) == 32 and rows_together(256, FP8_INDEX, 128) == 64
    with pytest.raises(ValueError, match="tile: expected at most 64 entries for pages of 32, got 128"):
        rows_together(32, FP32_INDEX, 128)


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


@pytest.mark.parametrize(
    ("k", "entries", "maxima", "groups", "message"),
    [
        (1024, 524296, 65537, 1, "at most 524288 entries for k = 1024, got 524296"),
        (1024, 20000, 2499, 1, "maxima: expected one of each 8 of 20000 scores, got 2499"),
        (1024, 20000, 2500, 0, r"groups: expected at least \(1, 1024\), got \(0, 1024\)"),
    ],
)
def test_what_cannot_be_ranked_is_refused(k, entries, maxima, groups, message):
    world = make_world(BF16_INDEX, requests=((0, 3),), heads=2)
    out = torch.full((1, k), 7, dtype=torch.int32)
    scores, best = torch.zeros(1, entries), torch.zeros(1, maxima)
    with pytest.raises(ValueError, match=message):
        topk_entries(world.step, scores, best, 0, RATIO, out, torch.zeros(groups, k, dtype=torch.int32))
    assert (out == 7).all() and GROUP == 8


def test_no_tokens():
    world = make_world(BF16_INDEX, requests=((0, 3),), heads=2)
    none = torch.zeros(0, dtype=torch.int64)
    step = replace(world.step, positions=none, token_rows=none)
    out = torch.full((0, K), 7, dtype=torch.int32)
    arguments = (step, world.q[:0], world.weights[:0], world.pool, world.fmt, world.table, RATIO, out)
    naive_select_entries(*arguments)
    select_entries(*arguments, world.workspace())
