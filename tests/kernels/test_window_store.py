"""The window store: the kernel against the reference, bytes, machine code, and capture."""

import random

import pytest

from dsv4_kernels.layout import FP8_584_ROW
from dsv4_kernels.row_codec import naive_load_rows
from dsv4_kernels.row_codec.fused import store_format
from dsv4_kernels.window_store.fused import window_store_kernel
from dsv4_kernels.window_store.tuning import window_tuning
from tests.kernels.compiling import ARCHITECTURES, machine_code
from tests.kernels.flush_checks import check_a_captured_step_replays, faults_against_naive, same_bytes, schedule_state
from tests.kernels.flush_world import FORMATS, World, one_step, random_schedule
from tests.kernels.interpreting import interpreted_checks


def unfinished_faults(run, formats, device="cpu"):
    """Rows of inputs with one channel that is no finite number, and whether they are numbers in the pool."""
    world = World("window", [6], formats, seed=3, device=device)
    for token, (channel, value) in enumerate(((7, "inf"), (511, "-inf"), (0, "nan"), (448, "inf"), (100, "nan"))):
        world.inputs["window"][0][token, channel] = float(value)
    state = world.fresh_state()
    step, given = world.step([(0, 0, 6)])
    run(world, state, step, given)
    slots = step.window_slots(step.token_rows, step.positions)
    read = naive_load_rows(state["pool"], slots, FORMATS[formats][0]).isfinite().all(1).tolist()
    return [token for token in range(6) if read[token] != (token == 5)]


@pytest.mark.parametrize("formats", FORMATS)
def test_a_row_that_is_no_number_is_stored_as_none(formats):
    assert unfinished_faults(World.run_naive, formats) == []


def check_small(device="cpu"):
    """Rows of two sequences, over a page's end, padding among them; a wrong channel is seen."""
    world = World("window", [130, 9], "fp32", seed=3, device=device)
    before = [[(0, 0, 124)]]
    schedule = [[(0, 124, 3), (1, 0, 4)], [(1, 4, 1), (0, 127, 3)]]
    assert faults_against_naive(world, schedule, before=before) == []
    assert faults_against_naive(world, schedule, before=before, wrong=2.0**-7)
    for formats in FORMATS:
        assert unfinished_faults(World.run_fused, formats, device) == [], formats


def check_chunking(device="cpu"):
    """P1: the same bytes for any schedule, and for one row or four of a program."""
    world = World("window", [140, 37, 1], "fp8", seed=3, device=device)
    whole = schedule_state(world, one_step(world.lengths))
    schedule = random_schedule(world.lengths, random.Random(1), 90)
    assert same_bytes(schedule_state(world, schedule, pad=2), whole)
    if device != "cpu":
        long = World("window", [700, 37], "fp8", seed=4, device=device)
        whole = schedule_state(long, one_step(long.lengths))
        for seed in range(50):
            schedule = random_schedule(long.lengths, random.Random(seed), [700, 40][seed % 2])
            assert same_bytes(schedule_state(long, schedule, pad=seed % 3), whole), f"schedule {seed}"


SMALL = (check_small,)
CHECKS = (check_chunking,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")


@pytest.mark.gpu
def test_a_captured_step_replays():
    world = World("window", [300, 64], "fp8", seed=2, device="cuda")
    check_a_captured_step_replays(world, [[(0, 0, 130), (1, 0, 64)], [(0, 130, 170)]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture):
    rows, warps = window_tuning(4096)
    arguments = {
        "p_positions": "*i64",
        "p_token_rows": "*i64",
        "p_window_pages": "*i64",
        "page_stride": "i32",
        "p_kv": "*bf16",
        "token_stride": "i32",
        "p_weight": "*bf16",
        "eps": "fp32",
        "p_cos_sin": "*fp32",
        "p_pool": "*u8",
        "num_tokens": "i32",
    }
    constants = {"E": rows, "D": 512, "R": 64, "PAGE": 256, "FORMAT": store_format(FP8_584_ROW), "CASTS": architecture >= 89}
    assert machine_code(window_store_kernel, arguments, constants, architecture, warps)
