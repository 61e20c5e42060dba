"""The largest of each group of scores: the reference against a loop, the kernel against the reference."""

import pytest
import torch

from dsv4_kernels.group_maxima import naive_group_maxima
from dsv4_kernels.group_maxima.fused import group_maxima, group_maxima_kernel
from dsv4_kernels.index_topk import GROUP
from tests.kernels.compiling import ARCHITECTURES, machine_code
from tests.kernels.index_world import HARD, LENGTH, RATIO, hard_scores
from tests.kernels.interpreting import interpreted_checks


def test_matches_a_loop():
    scores = torch.randn(9, 48)
    visible = torch.tensor([48, 47, 41, 40, 39, 8, 1, 0, 17])
    found = torch.full((9, 6), 7.0)
    naive_group_maxima(scores, visible, 8, found)
    for row, count in enumerate(visible.tolist()):
        for group in range(6):
            seen = scores[row, 8 * group : min(8 * group + 8, count)]
            assert found[row, group] == (max(seen.tolist()) if len(seen) else 7.0)
    assert (found == 7.0).sum() == 0 + 0 + 0 + 1 + 1 + 5 + 5 + 6 + 3


def check_small(device="cpu"):
    """The maxima of scores that another kernel wrote; groups without a visible score, and short rows, are left alone."""
    scores = hard_scores(device)
    visible = torch.tensor([LENGTH, 513, 65, 17, 333], device=device).repeat_interleave(HARD)
    hidden = torch.arange(LENGTH, device=device) >= visible.unsqueeze(1)
    scores = scores.masked_fill(hidden, float("inf"))  # a maximum passes over NaN
    found, expected = torch.full((2, len(scores), LENGTH // GROUP), 7.0, device=device)
    positions = torch.cat([visible[:1], visible * RATIO - 1])
    for fewest in (0, 65):
        found.fill_(7.0), expected.fill_(7.0)
        group_maxima(positions, 1, RATIO, scores, found, fewest)
        naive_group_maxima(scores, visible, GROUP, expected)
        expected[visible <= fewest] = 7.0
        assert torch.equal(found, expected) and (found == 7.0).any(), f"fewest {fewest}"
    naive_group_maxima(scores.roll(1, 1), visible, GROUP, expected)
    assert not torch.equal(found, expected)


SMALL = (check_small,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL)
def test_on_a_gpu(check):
    check(device="cuda")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture):
    arguments = {
        "p_positions": "*i64",
        "first_token": "i32",
        "p_scores": "*fp32",
        "score_stride": "i32",
        "p_maxima": "*fp32",
        "maxima_stride": "i32",
    }
    constants = {"RATIO": RATIO, "FEWEST": 4096, "GROUP": GROUP, "BG": 512}
    assert machine_code(group_maxima_kernel, arguments, constants, architecture, 4)
