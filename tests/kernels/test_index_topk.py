"""Top-k: the reference against a sort, the kernel against the reference over hard scores, machine code."""

from dataclasses import replace

import pytest
import torch

from dsv4_kernels.index_topk import GROUP, naive_topk_entries
from dsv4_kernels.index_topk.fused import topk_entries, topk_entries_kernel
from dsv4_kernels.index_topk.tuning import topk_levels, topk_registers
from dsv4_kernels.layout import BF16_INDEX, FP32_INDEX
from tests.kernels.compiling import ARCHITECTURES, machine_code
from tests.kernels.index_world import HARD, LENGTH, RATIO, K, hard_scores, make_world
from tests.kernels.interpreting import interpreted_checks


def test_ties_go_to_the_lowest_index():
    scores = torch.tensor([[1.0, 5.0, 1.0, 5.0, 1.0, 0.0], [0.0] * 6, [2.0, 2.0, 9.0, 9.0, 9.0, 9.0]])
    chosen = naive_topk_entries(scores, torch.tensor([6, 5, 2]), 4)
    assert chosen.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, -1, -1]]


def test_nothing_visible_and_fewer_than_k():
    scores = torch.full((2, 3), float("nan"))
    scores[1, 0] = -1.0
    assert naive_topk_entries(scores, torch.tensor([0, 1]), 5).tolist() == [[-1, -1, -1], [0, -1, -1]]


def test_matches_a_sort_by_score_and_index():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (50, 40), generator=generator).float()
    visible = torch.randint(0, 41, (50,), generator=generator)
    chosen = naive_topk_entries(scores, visible, 9)
    for row, count, found in zip(scores.tolist(), visible.tolist(), chosen.tolist(), strict=True):
        best = sorted(range(count), key=lambda s: (-row[s], s))[:9]
        assert found == sorted(best) + [-1] * (9 - len(best))


@pytest.mark.parametrize(
    ("k", "entries", "maxima", "groups", "message"),
    [
        (1024, 524296, 65537, 1, "at most 524288 entries for k = 1024, got 524296"),
        (1024, 20000, 2499, 1, "maxima: expected one of each 8 of 20000 scores, got 2499"),
        (1024, 20000, 2500, 0, r"groups: expected at least \(1, 1024\), got \(0, 1024\)"),
    ],
)
def test_what_cannot_be_ranked_is_refused(k, entries, maxima, groups, message):
    world = make_world(BF16_INDEX, requests=((0, 3),), heads=2)
    out = torch.full((1, k), 7, dtype=torch.int32)
    scores, best = torch.zeros(1, entries), torch.zeros(1, maxima)
    with pytest.raises(ValueError, match=message):
        topk_entries(world.step, scores, best, 0, RATIO, out, torch.zeros(groups, k, dtype=torch.int32))
    assert (out == 7).all() and GROUP == 8


def choices_agree(lengths, cases, device):
    """The choice alone, over hard scores, by one, two and three levels; nothing past the visible scores is read."""
    scores = hard_scores(device)[: HARD * len(lengths)]
    length = scores.shape[1]
    world = make_world(FP32_INDEX, ((RATIO * length, 1),), heads=1, device=device)
    table = world.step.history_pages[:, : RATIO * length // 128].expand(len(scores), -1)
    visible = torch.tensor(lengths, device=device).repeat_interleave(HARD)
    tokens = torch.arange(len(scores), device=device)
    step = replace(world.step, positions=visible * RATIO - 1, token_rows=tokens, history_pages=table.contiguous())
    hidden = torch.arange(length, device=device) >= visible.unsqueeze(1)
    scores = scores.masked_fill(hidden, float("nan"))
    maxima = scores.masked_fill(hidden, float("-inf")).unflatten(1, (-1, GROUP)).amax(2)
    maxima[hidden[:, ::GROUP]] = float("nan")
    for k, levels in cases:
        expected = replace(world, step=step).rows_of(naive_topk_entries(scores, visible, k))
        chosen = naive_topk_entries(scores[:HARD], visible[:HARD], k)
        backwards = length - 1 - naive_topk_entries(scores[:HARD].flip(1), visible[:HARD], k).flip(1)
        assert (backwards != chosen).any(1).sum() >= 6, "rows where the rule for ties matters"
        assert topk_levels(length, k)[2] == levels
        wide = torch.full((len(scores), k + 3), 7, dtype=torch.int32, device=device)
        groups = torch.full((len(scores), k), -1, dtype=torch.int32, device=device)
        for first, count in ((0, 25), (25, len(scores) - 25)):
            part = slice(first, first + count)
            topk_entries(step, scores[part], maxima[part], first, RATIO, wide[:, :k], groups)
        assert (wide[:, k:] == 7).all(), f"k {k}: more than k were chosen"
        assert torch.equal(wide[:, :k], expected), f"k {k}"


def check_small(device="cpu"):
    """One, two and three levels."""
    choices_agree((LENGTH, 65), ((K, 2), (2, 3), (88, 1)), device)


def check_levels(device="cpu"):
    """Rows of every length."""
    choices_agree((LENGTH, 513, 65, 17, 333), ((K, 2), (2, 3), (88, 1), (K - 3, 2)), device)


SMALL = (check_small,)
CHECKS = (check_levels,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("k", [512, 1024])
@pytest.mark.parametrize("max_entries", [8192, 262144])
def test_machine_code(architecture, k, max_entries):
    size, small, levels = topk_levels(max_entries, k)
    arguments = {
        "p_positions": "*i64",
        "first_token": "i32",
        "p_token_rows": "*i64",
        "p_pages": "*i64",
        "page_stride": "i32",
        "p_scores": "*fp32",
        "score_stride": "i32",
        "p_maxima": "*fp32",
        "maxima_stride": "i32",
        "p_groups": "*i32",
        "p_out": "*i32",
        "out_stride": "i32",
        "num_window_rows": "i32",
    }
    constants = {
        "RATIO": RATIO,
        "K": k,
        "SIZE": size,
        "PER_PAGE": 64,
        "K_BLOCK": k,
        "SMALL": small,
        "GROUP": GROUP,
        "LEVELS": levels,
        "PAD": True,
    }
    registers = topk_registers(4096 if k == 512 else 1, levels)
    assert machine_code(topk_entries_kernel, arguments, constants, architecture, 8, maxnreg=registers)
