"""The fused step plan on a GPU: the checks of `tests.kernels.step_plan_checks`, and capture."""

import pytest
import torch

from dsv4_kernels.step_plan import naive_step_plan, step_buffers
from dsv4_kernels.step_plan.fused import StepPlanLaunch, step_plan
from tests.kernels.step_plan_checks import CHECKS, PAGE, TENSORS, differing, make_inputs, planned

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("check", CHECKS)
def test_as_interpreted(check):
    CHECKS[check](device="cuda")


def test_a_captured_plan_follows_its_inputs():
    """One decode graph of four requests: replayed for two requests of other lengths, its rest is padding."""
    given = make_inputs([300, 5, 600, 256], [1, 1, 1, 1], device="cuda", seed=1)
    later = make_inputs([512, 601], [1, 1], padding=2, device="cuda", seed=2)
    later["token_slots"] = torch.nn.functional.pad(later["token_slots"], (0, 0, 0, 2))
    later["window_slots"] = torch.nn.functional.pad(
        later["window_slots"], (0, len(given["window_slots"]) - len(later["window_slots"]))
    )
    out = step_buffers(4, 4, 3, PAGE, 4096, "cuda")
    first_tokens = torch.zeros(4, dtype=torch.int64, device="cuda")
    step_plan(out, first_tokens, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_plan(out, first_tokens, **given)
    for name, tensor in later.items():
        given[name].copy_(tensor)
    for name in TENSORS:
        getattr(out, name).fill_(2**63 - 1)
    graph.replay()
    found = {name: getattr(out, name) for name in TENSORS} | {"first_tokens": first_tokens}
    assert not differing(found, planned(naive_step_plan, later, 4, 3))


def test_a_kept_launch_follows_its_inputs():
    given = make_inputs([300, 5, 600, 256], [1, 1, 1, 1], device="cuda", seed=1)
    later = make_inputs([301, 6, 601, 257], [1, 1, 1, 1], device="cuda", seed=2)
    out = step_buffers(4, 4, 3, PAGE, 4096, "cuda")
    first_tokens = torch.zeros(4, dtype=torch.int64, device="cuda")
    launch = StepPlanLaunch(out, first_tokens, **given)
    first = {name: tensor.clone() for name, tensor in given.items()}
    for inputs in (first, later, first):
        for name, tensor in inputs.items():
            given[name].copy_(tensor)
        for name in TENSORS:
            getattr(out, name).fill_(2**63 - 1)
        launch()
        found = {name: getattr(out, name) for name in TENSORS} | {"first_tokens": first_tokens}
        assert not differing(found, planned(naive_step_plan, inputs, 4, 3))
