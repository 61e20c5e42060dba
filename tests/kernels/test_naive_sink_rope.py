"""Merge, sink and inverse rotation against attention computed whole, in fp64."""

import math

import pytest
import torch

from dsv4_kernels.norm_rope import RopeSpec, naive_rope, rope_table
from dsv4_kernels.sink_rope import Splits, naive_sink_rope

INF = math.inf
TABLE = rope_table(RopeSpec(10000.0, 64), 100)
# fp32: sums of at most 40 values, three exponentials, a rotation.
ALLOWED = 2.0**-18


def attend(logits, values):
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


def whole(logits, values, sink, position):
    weights = torch.cat([logits, sink.double().unsqueeze(1)], 1).softmax(1)[:, :-1]
    out = weights @ values
    if position >= 0:
        cos, sin = TABLE[position].double().chunk(2)
        even, odd = out[:, -64::2], out[:, -63::2]
        turned = torch.stack([even * cos + odd * sin, odd * cos - even * sin], -1).flatten(-2)
        out = torch.cat([out[:, :-64], turned], 1)
    return out


def case(lengths, heads=4):
    logits = [torch.randn(heads, n, dtype=torch.float64) for n in lengths]
    values = [torch.randn(n, 512, dtype=torch.float64) for n in lengths]
    return logits, values, torch.randn(heads)


def test_sink_and_rotation():
    logits, values, sink = case([1, 40, 7])
    positions = torch.tensor([0, 99, -1])
    parts = [attend(a, b) for a, b in zip(logits, values, strict=True)]
    out, lse = (torch.stack(part).float() for part in zip(*parts, strict=True))
    naive_sink_rope(out, lse, sink, positions, TABLE)
    for token in range(3):
        expected = whole(logits[token], values[token], sink, int(positions[token]))
        assert (out[token] - expected).abs().max() <= ALLOWED * 4
        assert (out[token] - whole(logits[token], values[token], sink + 0.01, int(positions[token]))).abs().max() > ALLOWED * 4


@pytest.mark.parametrize("cuts", [[0, 20, 40], [0, 1, 2, 39, 40], [0, 0, 40, 40]])
def test_pieces_give_the_whole(cuts):
    """Lanes 3, 4, ..: the first piece in its lane's second slot, the others in their lanes' first; other slots are NaN."""
    logits, values, sink = case([40, 5])
    pieces = len(cuts) - 1
    partial, partial_lse = torch.full((20, 4, 512), math.nan), torch.full((20, 4), math.nan)
    for i in range(pieces):
        slot = 7 if i == 0 else 2 * (3 + i)
        part = slice(cuts[i], cuts[i + 1])
        value, lse = attend(logits[0][:, part], values[0][part])
        partial[slot], partial_lse[slot] = value.nan_to_num().float(), (lse / math.log(2)).float()
    value, lse = attend(logits[1], values[1])
    out = torch.stack([torch.full((4, 512), math.nan), value.float()])
    lse = torch.stack([torch.full((4,), math.nan), lse.float()])
    splits = Splits(torch.tensor([3, 9]), torch.tensor([pieces, 1]), partial, partial_lse)
    naive_sink_rope(out, lse, sink, torch.tensor([5, 6]), TABLE, splits)
    for token in range(2):
        expected = whole(logits[token], values[token], sink, 5 + token)
        assert (out[token] - expected).abs().max() <= ALLOWED * 4


@pytest.mark.parametrize("sink", [INF, -INF, 0.0])
@pytest.mark.parametrize("lse", [-INF, 3.0])
def test_extremes(sink, lse):
    out = torch.ones(1, 2, 512) if lse > 0 else torch.zeros(1, 2, 512)
    naive_sink_rope(out, torch.full((1, 2), lse), torch.full((2,), sink), torch.tensor([0]), None)
    expected = 0.0 if lse == -INF or sink == INF else 1.0 if sink == -INF else 1 / (1 + math.exp(-3))
    assert (out - expected).abs().max() <= 2.0**-22


def test_without_sink_and_table_nothing_changes():
    out = torch.randn(2, 3, 512).bfloat16()
    before = out.clone()
    naive_sink_rope(out, torch.zeros(2, 3), None, torch.tensor([3, 4]), None)
    assert torch.equal(out, before)
    naive_sink_rope(out, torch.zeros(2, 3), None, torch.tensor([3, 4]), TABLE)
    expected = naive_rope(before, TABLE[torch.tensor([3, 4])], inverse=True).bfloat16()
    assert torch.equal(out, expected)
