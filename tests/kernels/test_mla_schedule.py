"""Schedules: every key of every query once, balanced lanes, pieces that merge to the whole; the kernel, every number."""

import itertools
import math

import pytest
import torch

from dsv4_kernels.layout import BF16_ROW
from dsv4_kernels.mla_schedule import WorkLists, max_works, naive_mla_schedule
from dsv4_kernels.mla_schedule.fused import mla_schedule, mla_schedule_kernel
from dsv4_kernels.row_lists import naive_row_lists
from dsv4_kernels.sink_rope import Splits, naive_sink_rope
from tests.kernels.attention_world import (
    CSA,
    HCA,
    KINDS,
    exact_attention,
    fill_pool,
    make_selected,
    make_step,
    make_work,
    run_schedule,
)
from tests.kernels.compiling import ARCHITECTURES, KIND, machine_code
from tests.kernels.interpreting import interpreted_checks

SCHEDULES = [
    ("equal", [5000] * 8, 132),
    ("one", [900_000], 132),
    ("rest of a round", [5000] * 21, 16),
    ("rounds", [5000] * 32, 16),
    ("short", [5, 70, -1, 200, 127], 16),
    ("unequal", [100] * 20 + [900_000] + [300] * 20, 16),
    ("few lanes", [3, 1000, 17_000, 900_000, -1, 5], 2),
    ("one lane", [3, 1000, -1], 1),
    ("prefill", list(range(300)), 16),
]


def tiles_of_lanes(work):
    """Tiles that each lane takes."""
    begins = work.lane_begin.tolist()
    tiles = ((work.key_end - work.key_begin + 63) // 64).tolist()
    return [sum(tiles[a:b]) for a, b in zip(begins, begins[1:], strict=False)]


def schedule(positions, kind, lanes, split=True):
    work = make_work(len(positions), lanes)
    naive_mla_schedule(torch.tensor(positions), kind, 9000, 64, work, split)
    return work


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SCHEDULES, ids=[name for name, _, _ in SCHEDULES])
def test_every_key_is_taken_once(case, kind, split):
    _, positions, lanes = case
    work = schedule(positions, KINDS[kind], lanes, split)
    count = int(work.lane_begin[-1])
    assert count <= max_works(len(positions), lanes)
    lengths = KINDS[kind].lengths(torch.tensor(positions)).tolist()
    for token, length in enumerate(lengths):
        mine = work.query[:count] == token
        ranges = sorted(zip(work.key_begin[:count][mine].tolist(), work.key_end[:count][mine].tolist(), strict=True))
        assert len(ranges) == work.num_pieces[token]
        assert ranges[0][0] == 0 and ranges[-1][1] == length
        assert all(a[1] == b[0] and b[0] % 64 == 0 for a, b in zip(ranges, ranges[1:], strict=False))
        assert (work.list_begin[:count][mine] == token * 9000).all()
        assert (work.list_length[:count][mine] == length).all()
        slots = work.partial_row[:count][mine]
        assert (slots == -1).all() if len(ranges) == 1 else len(slots.unique()) == len(ranges)
    slots = work.partial_row[:count]
    slots = slots[slots >= 0]
    assert len(slots.unique()) == len(slots) and (slots % 64 == 0).all()
    assert slots.numel() == 0 or slots.max() < 2 * lanes * 64


@pytest.mark.parametrize(
    ("batch", "tiles"),
    [(1, 1), (8, 1), (13, 1), (16, 2), (32, 3), (44, 4), (64, 5), (66, 5), (67, 6), (128, 10), (160, 13), (256, 20)],
)
def test_equal_lists_are_shared_out_evenly(batch, tiles):
    """640 keys, ten tiles, on the 132 lanes of an H200: the longest lane, whose ideal is batch * 10 / 132."""
    work = schedule([8191] * batch, CSA, 132)
    assert max(tiles_of_lanes(work)) == tiles
    works = (work.lane_begin[1:] - work.lane_begin[:-1]).max()
    if batch != 67:  # where pieces of equal size would take ten tiles
        assert works <= -(-batch // 132), "a lane goes on with one query and begins another"


def test_a_prefill_keeps_neighbours_together():
    """Lane ``i`` takes queries ``i``, ``i + 16``, ..; one query that is half the work is shared out all the same."""
    work = schedule(list(range(3000, 3080)), CSA, 16)
    assert work.query[:5].tolist() == [0, 16, 32, 48, 64] and (work.num_pieces == 1).all()
    taken = tiles_of_lanes(schedule([900_000, *range(300, 380)], HCA, 16))
    assert max(taken) <= -(-sum(taken) // 16) + 1


def test_unequal_lists_are_shared_out_evenly():
    """One query of 8,320 keys beside 255 of 130: within a tile of the ideal."""
    positions = [(1 << 20) - 1] + [300] * 255
    taken = tiles_of_lanes(schedule(positions, HCA, 132))
    assert max(taken) <= -(-sum(taken) // 132) + 1


@pytest.mark.parametrize("case", SCHEDULES, ids=[name for name, _, _ in SCHEDULES])
def test_whole_queries_go_round_the_lanes(case):
    """Nothing about a query's work depends on the others but its lane."""
    _, positions, lanes = case
    work = schedule(positions, CSA, lanes, split=False)
    assert (work.num_pieces == 1).all()
    assert work.first_lane.tolist() == [token % lanes for token in range(len(positions))]
    if max(positions) > 10_000 and lanes > 1:
        assert (schedule(positions, HCA, lanes).num_pieces > 1).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_a_kernel_that_works_it_off_attends_to_everything(kind, lanes):
    kind = KINDS[kind]
    positions = [3000, -1, 0, 63, 2047, 5000, 700]
    step = make_step(positions)
    lists = torch.full((len(positions), kind.width(5001)), -1, dtype=torch.int32)
    naive_row_lists(step, kind, lists, make_selected(step, CSA) if kind is CSA else None)
    entries = step.num_window_rows // kind.ratio if kind.ratio else 0
    pool = fill_pool(BF16_ROW, step.num_window_rows + entries, lists[lists >= 0])
    q, lengths = torch.randn(len(positions), 4, 512), kind.lengths(step.positions)
    work = make_work(len(positions), lanes)
    naive_mla_schedule(step.positions, kind, lists.shape[1], 4, work)
    out, lse, partial, partial_lse = run_schedule(q, pool, lists, work)
    splits = Splits(work.first_lane, work.num_pieces, partial, partial_lse)
    sink = torch.randn(4)
    naive_sink_rope(out, lse, sink, step.positions, None, splits)
    expected, expected_lse = exact_attention(q, pool, BF16_ROW, lists, lengths)
    weight = torch.sigmoid(expected_lse - sink)
    assert (out - expected * weight.unsqueeze(-1)).abs().max() <= 2.0**-16
    if lanes == 16 and kind is not KINDS["window"]:
        assert (work.num_pieces > 1).any()
        lost = work.key_end.clone()
        lost[int(work.lane_begin[-1]) - 1] -= 1  # the twin: one key of one piece is left out
        naive_mla_schedule(step.positions, kind, lists.shape[1], 4, work)
        work.key_end.copy_(lost)
        again = run_schedule(q, pool, lists, work)
        naive_sink_rope(again[0], again[1], sink, step.positions, None, Splits(work.first_lane, work.num_pieces, *again[2:]))
        assert (again[0] - expected * weight.unsqueeze(-1)).abs().max() > 2.0**-16
    assert math.isfinite(out.sum())


def schedules_agree(cases, device):
    """Every number of every lane equals the reference's, and nothing else is written."""
    for name, positions, lanes in cases:
        tensor = torch.tensor(positions, device=device)
        for kind, split in itertools.product(KINDS.values(), (True, False)):
            found, expected = (make_work(len(positions), lanes, device) for _ in range(2))
            mla_schedule(tensor, kind, 9000, 64, found, split)
            naive_mla_schedule(tensor, kind, 9000, 64, expected, split)
            for field in found._fields:
                same = torch.equal(getattr(found, field), getattr(expected, field))
                assert same, f"{name} {kind.name} {lanes} lanes, split {split}: {field}"


def check_small(device="cpu"):
    """Few lanes, queries of every length, several rounds."""
    schedules_agree([case for case in SCHEDULES if case[2] <= 2 or case[0] in ("short", "rounds")], device)


def check_more_lanes(device="cpu"):
    """As many lanes as a GPU has."""
    schedules_agree(SCHEDULES, device)


SMALL = (check_small,)
CHECKS = (check_more_lanes,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block", [32, 8192])
def test_machine_code(architecture, block):
    arguments = {
        "p_positions": "*i64",
        "num_tokens": "i32",
        "list_stride": "i32",
        "num_heads": "i32",
        "work": WorkLists(*["*i32"] * len(WorkLists._fields)),
        "num_lanes": "i32",
    }
    constants = KIND | {"SPLIT": True, "TILE": 64, "SECOND": 2, "MANY": 2, "PIECE": 12, "BT": block}
    assert machine_code(mla_schedule_kernel, arguments, constants, architecture, 4 if block == 32 else 8)
