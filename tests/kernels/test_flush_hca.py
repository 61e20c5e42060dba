"""The HCA flush: the kernel against the reference, any schedule against any other, machine code, and capture.

The reference itself is tested through the cache: `tests/cache/test_oracle.py`, against transformers and in fp64.
"""

import random

import pytest
import torch

from dsv4_kernels.compressor.fused import CompressorPointers, CompressorShape
from dsv4_kernels.flush_hca import HcaTuning
from dsv4_kernels.flush_hca.fused import HcaWorkspace, flush_hca, flush_hca_kernel
from dsv4_kernels.flush_hca.tuning import hca_tuning
from dsv4_kernels.layout import FP8_584_ROW, FP32_ROW
from dsv4_kernels.row_codec.fused import store_format
from tests.kernels.compiling import ARCHITECTURES, STEP, machine_code
from tests.kernels.flush_checks import check_a_captured_step_replays, faults_against_naive, same_bytes, schedule_state
from tests.kernels.flush_world import DIM, World, one_step, random_schedule
from tests.kernels.interpreting import interpreted_checks

DTYPES = [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.float32), ("fp8", torch.bfloat16)]


def world_of_ones(device="cpu"):
    """Inputs of ones, and gates of -inf at the first tokens of both blocks and at one within."""
    world = World("hca", [136], "fp32", seed=3, device=device)
    rows = world.inputs["hca"][0]
    rows[:, :DIM], rows[:, DIM:] = 1.0, 0.0
    rows[[0, 1, 77, 128, 129], DIM:] = float("-inf")
    return world


def entry_of(world, state):
    """The first entry, and the accumulator of the second block."""
    page, window_rows = int(world.history[0, 0]), world.num_pages * world.page_tokens
    return state["pool"][window_rows + page], state["accumulators"][world.slots[0], 0]


@pytest.mark.parametrize("cuts", [[1] * 136, [136], [1, 1, 126, 2, 6]], ids=["one by one", "at once", "in parts"])
def test_a_gate_of_minus_infinity_has_no_weight(cuts):
    world = world_of_ones()
    ones, state, done = world.fresh_state(), world.fresh_state(), 0
    for count in cuts:
        step, given = world.step([(0, done, count)])
        world.run_naive(state, step, given)
        given["hca"][:, DIM:] = 0.0
        world.run_naive(ones, step, given)
        done += count
        # What is kept is finite, also before the first token that has weight.
        assert done == 128 or state["accumulators"][world.slots[0]].isfinite().all(), done
    (entry, accumulator), (expected, _) = entry_of(world, state), entry_of(world, ones)
    assert (entry - expected).abs().max() <= 2.0**-20 * expected.abs().max()
    assert (accumulator[2] == accumulator[1]).all() and (accumulator[1] > 1).all()


def refused(tuning, rows):
    """A launch with a tuning and a workspace of so many rows, or without one; its state afterwards."""
    world = World("hca", [140], "fp32", seed=3)
    state = world.fresh_state()
    step, given = world.step([(0, 0, 140)])
    work = None if rows is None else HcaWorkspace(torch.zeros(rows, DIM), torch.zeros(rows, dtype=torch.int32))
    try:
        flush_hca(step, given["hca"], state["accumulators"], state["pool"], FP32_ROW, world.params["hca"], work, tuning)
    finally:
        assert all(tensor.isnan().all() for tensor in state.values())


def test_a_tuning_that_needs_a_workspace_is_refused_without():
    with pytest.raises(ValueError, match="tuning: expected split 1 without a workspace, got 4"):
        refused(HcaTuning(4, 1, 4), None)
    with pytest.raises(ValueError, match="workspace: expected at least 3 rows, got 2"):
        refused(HcaTuning(4, 1, 4), 2)
    assert hca_tuning(140, 1).split > 1 and hca_tuning(140, 1, has_workspace=False) == HcaTuning(4, 4, 1)


def check_small(device="cpu"):
    """A block that ends in a decode step, in an extension, whole ones, and what is kept of one that goes on."""
    world = World("hca", [262, 3], "fp32", draft=1, seed=3, device=device)
    for before, schedule in (
        ([[(0, 0, 127)]], [[(0, 127, 1), (1, 0, 1)], [(0, 128, 3), (1, 1, 2)]]),
        ([[(0, 0, 125), (1, 0, 1)]], [[(1, 1, 2), (0, 125, 137)]]),
    ):
        found = faults_against_naive(world, schedule, before=before)
        assert not found, (schedule, found)
    found = faults_against_naive(world, [[(1, 1, 2)]], before=[[(1, 0, 1)]], wrong=2.0**-7)
    assert found, "a wrong gate was not seen"
    world = world_of_ones(device)
    for before, schedule in (([[(0, 0, 1)]], [[(0, 1, 1)], [(0, 2, 134)]]), ([[(0, 0, 127)]], [[(0, 127, 2)]])):
        found = faults_against_naive(world, schedule, before=before)
        assert not found, (schedule, found)


def check_values(device="cpu"):
    """Values and written rows against the reference, over random schedules."""
    for draft in (0, 3):
        world = World("hca", [140, 37, 1], "fp32", draft=draft, seed=3, device=device)
        found = faults_against_naive(world, random_schedule(world.lengths, random.Random(draft), 60))
        assert not found, found


def check_chunking(device="cpu"):
    """P1: the same bytes for any schedule, padded or not, with a workspace or without."""
    world = World("hca", [140, 37, 1], "fp8", draft=1, seed=3, device=device)
    whole = schedule_state(world, one_step(world.lengths))
    for seed, most in ((1, 90), (2, 30)):
        schedule = random_schedule(world.lengths, random.Random(seed), most)
        state = schedule_state(world, schedule, pad=2, together=seed == 1)
        assert same_bytes(state, whole), f"schedule {seed}"


def check_tunings(device="cpu"):
    """The same bytes however a launch is cut."""
    world = World("hca", [140, 37, 1], "fp8", draft=1, seed=3, device=device)
    schedule = [[(0, 0, 70), (1, 0, 37)], [(0, 70, 1), (2, 0, 1)], [(0, 71, 69)]]
    whole = schedule_state(world, schedule)
    for tuning in (HcaTuning(16, 1, 16), HcaTuning(4, 1, 4), HcaTuning(8, 4, 2)):
        assert same_bytes(schedule_state(world, schedule, tuning=tuning), whole), tuning


SMALL = (check_small,)
CHECKS = (check_values, check_chunking, check_tunings)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("formats", "dtype"), DTYPES, ids=str)
def test_bytes_do_not_depend_on_the_schedule(formats, dtype):
    world = World("hca", [700, 37, 1, 300, 129, 128], formats, dtype, draft=2, seed=11, device="cuda")
    whole = schedule_state(world, one_step(world.lengths))
    assert same_bytes(schedule_state(world, one_step(world.lengths)), whole), "a second run differs: a race"
    for seed in range(200):
        schedule = random_schedule(world.lengths, random.Random(seed), [300, 150, 40, 4][seed % 4])
        state = schedule_state(world, schedule, pad=seed % 3, together=seed % 2 == 0)
        assert same_bytes(state, whole), f"schedule {seed}"


@pytest.mark.gpu
def test_a_captured_step_replays():
    world = World("hca", [300, 64], "fp8", seed=2, device="cuda")
    check_a_captured_step_replays(world, [[(0, 0, 130), (1, 0, 64)], [(0, 130, 170)]])


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [64, 4096], ids=["decode", "prefill"])
def test_machine_code(architecture, tokens):
    unroll, warps, split = hca_tuning(tokens, 64)
    pointers = CompressorPointers("*bf16", "*fp32", None, "*u8", "*fp32", "*fp32", "*fp32")
    work = HcaWorkspace("*fp32", "*i32") if split > 1 else None
    sizes = dict.fromkeys(("num_requests", "num_tokens", "page_stride", "num_window_rows"), "i32")
    arguments = {"step": STEP, "comp": pointers, "work": work, **sizes, "eps": "fp32"}
    constants = {
        "S": CompressorShape(
            dim=512,
            rope_dim=64,
            ratio=128,
            token_stride=1024,
            ring=1,
            page_tokens=256,
            rotate=False,
            store=store_format(FP8_584_ROW),
        ),
        "U": unroll,
        "SPLIT": split,
        "REQUESTS_ONLY": tokens <= 64,
        "CASTS": architecture >= 89,
    }
    assert machine_code(flush_hca_kernel, arguments, constants, architecture, warps)
