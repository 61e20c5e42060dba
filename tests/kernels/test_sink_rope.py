"""Merge, sink and inverse rotation: the reference against attention computed whole, the kernel against the reference."""

import math

import pytest
import torch

from dsv4_kernels.norm_rope import RopeSpec, naive_rope, rope_table
from dsv4_kernels.sink_rope import Splits, naive_sink_rope
from dsv4_kernels.sink_rope import fused as sink_rope_fused
from dsv4_kernels.sink_rope.fused import sink_rope, sink_rope_kernel
from dsv4_kernels.sink_rope.tuning import sink_rope_tuning
from tests.kernels.compiling import ARCHITECTURES, machine_code
from tests.kernels.interpreting import interpreted_checks

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


def splits_of(tokens, heads, dim, counts, device, dtype=torch.bfloat16):
    """Pieces of every count; a slot that belongs to no piece is NaN, and some pieces are empty."""
    lanes = sum(counts) + 1
    partial = torch.full((2 * lanes, heads, dim), math.nan, dtype=dtype)
    partial_lse = torch.full((2 * lanes, heads), math.nan)
    first, lane = [], 0
    for count in counts:
        first.append(lane)
        slots = [2 * lane + 1] + [2 * (lane + i) for i in range(1, count)]
        partial[slots] = torch.randn(count, heads, dim).to(dtype)
        partial_lse[slots] = 5 * torch.randn(count, heads)
        if count > 2:
            partial_lse[slots[1], 0] = -INF
        if count == 2:
            partial_lse[slots, 1] = -INF  # a head without keys at all
        lane += count
    ints = {"dtype": torch.int32, "device": device}
    return Splits(torch.tensor(first, **ints), torch.tensor(counts, **ints), partial.to(device), partial_lse.to(device))


def outputs_agree(tunings, device):
    """Sinks of every kind, pieces, padding and no keys; one rounding apart at most, and a wrong position is seen."""
    heads = 8 if device == "cpu" else 64
    table = rope_table(RopeSpec(10000.0, 64), 701, device)
    positions = torch.tensor([5, -1, 0, 699, 64, 3], device=device)
    sink = torch.randn(heads, device=device)
    sink[:3] = torch.tensor([INF, -INF, 0.0])
    chosen = sink_rope_fused.sink_rope_tuning
    for tuning in tunings:
        for counts in (None, [1, 1, 2, 5, 1, 11]):
            out = torch.randn(6, heads, 512, device=device).bfloat16()
            lse = 3 * torch.randn(6, heads, device=device)
            out[4], lse[4] = 0.0, -INF
            splits = None
            if counts is not None:
                splits = splits_of(6, heads, 512, counts, device)
                several = torch.tensor(counts, device=device) > 1
                out[several], lse[several] = math.nan, math.nan
            for given_sink, cos_sin in ((sink, table), (None, table), (sink, None)):
                found, expected = out.clone(), out.float()
                if tuning is not None:
                    sink_rope_fused.sink_rope_tuning = lambda *_, best=tuning: best
                sink_rope(found, lse, given_sink, positions, cos_sin, splits)
                sink_rope_fused.sink_rope_tuning = chosen
                naive_sink_rope(expected, lse, given_sink, positions, cos_sin, splits)
                assert torch.isfinite(found).all(), (tuning, counts)
                # Half a bf16 step is at most 2^-8 of the value; exponentials and sums add 2^-18 of the largest.
                allowed = expected.abs() * 2.0**-8 + expected.abs().max() * 2.0**-18
                assert ((found.float() - expected).abs() <= allowed).all(), (tuning, counts)
                if cos_sin is not None:
                    wrong = out.float()
                    naive_sink_rope(wrong, lse, given_sink, positions + 1, cos_sin, splits)
                    assert ((found.float() - wrong).abs() > allowed).any(), "a wrong position was not seen"
                if tuning is not None and device == "cpu":
                    break


def check_small(device="cpu"):
    """As the launcher cuts it."""
    outputs_agree((None,), device)


def check_tunings(device="cpu"):
    """However it is cut."""
    outputs_agree(((4, 2, 4), (8, 1, 8)), device)


SMALL = (check_small,)
CHECKS = (check_tunings,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [8, 64, 256])
@pytest.mark.parametrize("lanes", [0, 132])
def test_machine_code(architecture, tokens, lanes):
    heads, pieces, warps = sink_rope_tuning(tokens, lanes)
    arguments = {
        "p_out": "*bf16",
        "p_lse": "*fp32",
        "p_positions": "*i64",
        "splits": Splits("*i32", "*i32", "*bf16", "*fp32") if lanes else None,
        "num_heads": "i32",
    }
    for rope, sink in ((64, "*fp32"), (0, "*fp32"), (64, None)):
        given = arguments | {"p_sink": sink, "p_cos_sin": "*fp32" if rope else None}
        constants = {"D": 512, "R": rope, "RB": rope or 2, "BH": heads, "BJ": pieces, "CASTS": architecture >= 89}
        assert machine_code(sink_rope_kernel, given, constants, architecture, warps)
