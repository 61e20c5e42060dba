"""Attention over row indices: fp64, lost keys, sinks, empty lists, poisoned memory."""

import pytest
import torch

from dsv4_kernels.layout import BF16_ROW, FP8_584_ROW
from dsv4_kernels.row_codec import naive_load_rows, naive_store_rows
from dsv4_kernels.sparse_attention import naive_sparse_attention

SCALE = 512**-0.5
INF = float("inf")


def make_case(fmt, lengths, heads=8, seed=0):
    """A pool that is NaN wherever no index points, and lists that end in -1."""
    generator = torch.Generator().manual_seed(seed)
    shape = fmt.pool_shape(4096)
    pool = torch.full((shape[0], shape[1] * fmt.storage_dtype.itemsize), 0xFF, dtype=torch.uint8).view(fmt.storage_dtype)
    indices = torch.full((len(lengths), max(lengths, default=0)), -1)
    for row, length in enumerate(lengths):
        indices[row, :length] = torch.randperm(4096, generator=generator)[:length]
    used = indices[indices >= 0].unique()
    naive_store_rows(pool, used, torch.randn(len(used), 512, generator=generator), fmt)
    q = torch.randn(len(lengths), heads, 512, generator=generator)
    return q, pool, indices, torch.randn(heads, generator=generator)


def exact(q, pool, fmt, indices, sink):
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -INF, dtype=torch.float64)
    for token, row in enumerate(indices):
        rows = naive_load_rows(pool, row[row >= 0], fmt).double()
        if len(rows):
            logits = q[token].double() @ rows.T * SCALE
            lse[token] = logits.logsumexp(-1)
            weights = torch.cat([logits, sink.double().unsqueeze(1)], 1).softmax(1)[:, :-1]
            out[token] = weights @ rows
    return out, lse


def tolerance(q, pool, fmt, indices):
    """fp32 error as a random walk: a logit adds 512 products in at least eight lanes, so its error is about
    sqrt(64) * 2^-24 * |q| |row| * scale; it moves a weight by as much, relatively, and numerator and denominator both.
    The mean adds N values: sqrt(N) * 2^-24. Both relative to the largest value."""
    rows = naive_load_rows(pool, indices[indices >= 0].unique(), fmt)
    logit_error = 8 * 2.0**-24 * (q.norm(dim=-1).max() * rows.norm(dim=-1).max() * SCALE)
    return ((2 * logit_error + indices.shape[1] ** 0.5 * 2.0**-24) * rows.abs().max()).item()


@pytest.mark.parametrize("fmt", [BF16_ROW, FP8_584_ROW], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("heads", [8, 64])
def test_matches_fp64_at_awkward_lengths(fmt, heads):
    q, pool, indices, sink = make_case(fmt, [0, 1, 63, 64, 640, 1152], heads)
    found, lse = naive_sparse_attention(q, pool, fmt, indices, sink, SCALE)
    expected, expected_lse = exact(q, pool, fmt, indices, sink)
    assert (found - expected).abs().max() <= tolerance(q, pool, fmt, indices)
    assert torch.equal(lse.isneginf(), expected_lse.isneginf())
    assert not found[0].any()


def test_every_dropped_key_is_noticed():
    q, pool, indices, sink = make_case(BF16_ROW, [640])
    expected, _ = exact(q, pool, BF16_ROW, indices, sink)
    allowed = tolerance(q, pool, BF16_ROW, indices)
    for column in range(640):
        kept = indices[:, [c for c in range(640) if c != column]]
        found, _ = naive_sparse_attention(q, pool, BF16_ROW, kept, sink, SCALE)
        assert (found - expected).abs().max() > allowed, column


@pytest.mark.parametrize("sink", [INF, -INF, 0.0])
def test_sinks(sink):
    q, pool, indices, _ = make_case(BF16_ROW, [3, 0])
    found, _ = naive_sparse_attention(q, pool, BF16_ROW, indices, torch.full((8,), sink), SCALE)
    assert torch.isfinite(found).all() and not found[1].any()
    if sink == INF:
        assert not found.any()
    else:
        expected, _ = exact(q, pool, BF16_ROW, indices, torch.full((8,), sink))
        assert (found - expected).abs().max() <= tolerance(q, pool, BF16_ROW, indices)


def test_result_has_the_dtype_of_the_queries():
    q, pool, indices, sink = make_case(BF16_ROW, [5])
    found, lse = naive_sparse_attention(q.bfloat16(), pool, BF16_ROW, indices, sink, SCALE)
    assert (found.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
