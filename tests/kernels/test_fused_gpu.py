"""The fused kernels on a GPU: the checks of `tests.kernels.fused_checks`, P1 over many schedules, and capture."""

import random

import pytest
import torch

from tests.kernels.flush_world import World, one_step, random_schedule
from tests.kernels.fused_checks import CHECKS, check_row_bytes, same_bytes, schedule_state

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("check", CHECKS)
def test_as_interpreted(check):
    CHECKS[check](device="cuda")


def test_hardware_casts_store_the_same_bytes():
    if torch.cuda.get_device_capability() < (8, 9):
        return  # there are none: integer arithmetic is what `test_as_interpreted` checks
    check_row_bytes("cuda", hardware_casts=True)


@pytest.mark.parametrize(
    ("formats", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.float32), ("fp8", torch.bfloat16)],
    ids=str,
)
def test_bytes_do_not_depend_on_the_schedule(formats, dtype):
    world = World([700, 37, 1, 300, 129, 128], formats, dtype, draft=2, seed=11, device="cuda")
    whole = schedule_state(world, one_step(world.lengths))
    assert same_bytes(schedule_state(world, one_step(world.lengths)), whole), "a second run differs: a race"
    for seed in range(200):
        schedule = random_schedule(world.lengths, random.Random(seed), [300, 150, 40, 4][seed % 4])
        state = schedule_state(world, schedule, pad=seed % 3, together=seed % 2 == 0)
        assert same_bytes(state, whole), f"schedule {seed}"


def test_a_captured_step_replays():
    world = World([300, 64], "fp8", seed=2, device="cuda")
    steps = [world.step([(0, 0, 130), (1, 0, 64)]), world.step([(0, 130, 170)])]
    eager, replayed = world.fresh_state(), world.fresh_state()
    for step, given in steps:
        world.run_fused(eager, step, given)
    graphs = []
    for step, given in steps:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            world.run_fused(replayed, step, given, together=False)
        graphs.append(graph)
    assert not same_bytes(eager, replayed)
    for graph in graphs:
        graph.replay()
    torch.cuda.synchronize()
    assert same_bytes(eager, replayed)
