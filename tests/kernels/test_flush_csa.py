"""The CSA flush: the kernel against the reference, any schedule against any other, machine code, and capture.

The reference itself is tested through the cache: `tests/cache/test_oracle.py`, against transformers and in fp64.
"""

import random
from itertools import product

import pytest
import torch

from dsv4_kernels.compressor.fused import CompressorPointers, CompressorShape
from dsv4_kernels.flush_csa import CsaTuning
from dsv4_kernels.flush_csa.fused import flush_csa_kernel
from dsv4_kernels.flush_csa.tuning import csa_tuning
from dsv4_kernels.layout import BF16_INDEX, BF16_ROW, FP8_584_ROW, FP8_INDEX
from dsv4_kernels.row_codec.fused import store_format
from tests.kernels.compiling import ARCHITECTURES, STEP, machine_code
from tests.kernels.flush_checks import check_a_captured_step_replays, faults_against_naive, same_bytes, schedule_state
from tests.kernels.flush_world import World, one_step, random_schedule
from tests.kernels.interpreting import interpreted_checks

DTYPES = [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.float32), ("fp8", torch.bfloat16)]


def check_small(device="cpu"):
    """Blocks from old rows, from new ones, from both and from a page's boundary; in one launch and in two."""
    world = World("csa", [134, 17], "fp32", draft=1, seed=3, device=device)
    before = [[(0, 0, 123), (1, 0, 6)]]
    for schedule in (
        [[(0, 123, 1), (1, 6, 1)], [(0, 124, 8), (1, 7, 1)]],  # a decode step, then an extension over the boundary
        [[(1, 6, 10), (0, 123, 9)], [(0, 132, 1)]],
        [[(1, 6, 2)], [(0, 123, 6), (1, 8, 9)], [(0, 129, 1)], [(0, 130, 3)]],
    ):
        found = faults_against_naive(world, schedule, before=before)
        assert not found, (schedule, found)
    for schedule in ([[(0, 128, 1)], [(0, 129, 3)]], [[(0, 128, 5)]]):
        found = faults_against_naive(world, schedule, before=[[(0, 0, 128)]], hit=True)
        assert not found, (schedule, found)
    found = faults_against_naive(world, [[(1, 6, 2)]], before=before, wrong=2.0**-7)
    assert len(found) >= 3, f"a wrong gate was not seen: {found}"


def check_values(device="cpu"):
    """Values and written rows against the reference, over random schedules."""
    for draft in (0, 3):
        world = World("csa", [140, 37, 1], "fp32", draft=draft, seed=3, device=device)
        found = faults_against_naive(world, random_schedule(world.lengths, random.Random(draft), 60))
        assert not found, found


def check_chunking(device="cpu"):
    """P1: the same bytes for any schedule, padded or not, in one launch or in two."""
    world = World("csa", [140, 37, 1], "fp8", draft=1, seed=3, device=device)
    whole = schedule_state(world, one_step(world.lengths))
    for seed, most in ((1, 90), (2, 30)):
        schedule = random_schedule(world.lengths, random.Random(seed), most)
        state = schedule_state(world, schedule, pad=2, together=seed == 1)
        assert same_bytes(state, whole), f"schedule {seed}"


def check_tunings(device="cpu"):
    """The same bytes however a launch is cut."""
    world = World("csa", [140, 37, 1], "fp8", draft=1, seed=3, device=device)
    schedule = [[(0, 0, 70), (1, 0, 37)], [(0, 70, 1), (2, 0, 1)], [(0, 71, 69)]]
    whole = schedule_state(world, schedule)
    for tuning, together in (
        (CsaTuning(1, 128, 1, 1, {}), True),
        (CsaTuning(2, 256, 2, 4, {}), False),
        (CsaTuning(4, 512, 2, 8, {}), True),
    ):
        state = schedule_state(world, schedule, together=together, tuning=tuning)
        for name, tensor in whole.items():
            assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), (tuning, name)


def check_ring_is_read_before_it_is_written(device="cpu"):
    """A step that closes a block from ring rows which its own survivors overwrite, at every start."""
    world = World("csa", [30], "fp32", seed=5, device=device)
    whole = schedule_state(world, one_step(world.lengths))
    for start in range(1, 9):
        interpreted = (12,) if start % 2 else (5,)  # both take long there
        for count in interpreted if device == "cpu" else (5, 12):
            state = schedule_state(world, [[(0, 0, start)], [(0, start, count)], [(0, start + count, 30 - start - count)]])
            assert same_bytes(state, whole), f"start {start}, {count} tokens"


SMALL = (check_small,)
CHECKS = (check_values, check_chunking, check_tunings, check_ring_is_read_before_it_is_written)


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
    world = World("csa", [700, 37, 1, 300, 129, 128], formats, dtype, draft=2, seed=11, device="cuda")
    whole = schedule_state(world, one_step(world.lengths))
    assert same_bytes(schedule_state(world, one_step(world.lengths)), whole), "a second run differs: a race"
    for seed in range(200):
        schedule = random_schedule(world.lengths, random.Random(seed), [300, 150, 40, 4][seed % 4])
        state = schedule_state(world, schedule, pad=seed % 3, together=seed % 2 == 0)
        assert same_bytes(state, whole), f"schedule {seed}"


@pytest.mark.gpu
def test_a_captured_step_replays():
    world = World("csa", [300, 64], "fp8", seed=2, device="cuda")
    check_a_captured_step_replays(world, [[(0, 0, 130), (1, 0, 64)], [(0, 130, 170)]])


FORMATS = {"fp8": (FP8_584_ROW, FP8_INDEX, "*u8"), "bf16": (BF16_ROW, BF16_INDEX, "*bf16")}
# A long prefill's program takes a compiler half a minute. It differs from an extension's in the length of its chunks, and
# between architectures in its casts.
CASES = [*product(ARCHITECTURES, (64, 512), FORMATS), *product((86, 90, 120), (4096,), ("fp8",))]


def shape(dim, fmt, *, rotate):
    return CompressorShape(
        dim=dim, rope_dim=64, ratio=4, token_stride=4 * dim, ring=8, page_tokens=256, rotate=rotate, store=store_format(fmt)
    )


@pytest.mark.long
@pytest.mark.parametrize(("architecture", "tokens", "formats"), CASES)
def test_machine_code(architecture, tokens, formats):
    rows, keys, pool = FORMATS[formats]
    tuning = csa_tuning(tokens, 64)
    pointers = CompressorPointers("*fp32", "*fp32", "*fp32", pool, "*fp32", "*fp32", "*fp32")
    sizes = dict.fromkeys(("num_requests", "num_tokens", "page_stride", "num_window_rows"), "i32")
    arguments = {"step": STEP, "main": pointers, "index": pointers, **sizes, "main_eps": "fp32", "index_eps": "fp32"}
    constants = {
        "MAIN": shape(512, rows, rotate=False),
        "INDEX": shape(128, keys, rotate=True),
        "REQUESTS_ONLY": tokens <= 64,
        "CASTS": architecture >= 89,
        "C": tuning.chunk,
        "MAIN_BLOCKS": tuning.main_blocks,
        "INDEX_BLOCKS": tuning.index_blocks,
    }
    assert machine_code(flush_csa_kernel, arguments, constants, architecture, tuning.warps, **tuning.options)
