"""Gathered rows: the reference against rows loaded one by one, the kernel against the reference."""

import pytest
import torch

from dsv4_kernels.layout import BF16_ROW, FP8_584_ROW
from dsv4_kernels.row_codec import naive_load_rows
from dsv4_kernels.row_codec.fused import store_format
from dsv4_kernels.row_gather import naive_row_gather
from dsv4_kernels.row_gather.fused import row_gather, row_gather_kernel
from dsv4_kernels.row_lists import naive_row_lists
from tests.kernels.attention_world import CSA, HCA, POSITIONS, fill_pool, make_selected, make_step
from tests.kernels.compiling import ARCHITECTURES, KIND, machine_code
from tests.kernels.interpreting import interpreted_checks


def test_rows_lie_where_their_lists_name_them():
    lists = torch.tensor([[5, 70, 3], [9, 1 << 30, 1 << 30], [8, 2, 1 << 30]], dtype=torch.int32)
    pool = fill_pool(FP8_584_ROW, 128, torch.tensor([5, 70, 3, 8, 2]), spread=30.0)
    rows = torch.full((9, 512), -7.0, dtype=torch.bfloat16)
    naive_row_gather(pool, FP8_584_ROW, lists, torch.tensor([3, 0, 2]), rows)
    for place, slot in ((0, 5), (1, 70), (2, 3), (6, 8), (7, 2)):
        expected = naive_load_rows(pool, torch.tensor([slot]), FP8_584_ROW)[0]
        assert torch.equal(rows[place].float(), expected), "e4m3 times a power of two is a bf16 number"
    assert (rows[[3, 4, 5, 8]] == -7).all()


def gathers(positions, device):
    """Decoded rows, to the bit; unlisted places stay, and rows that no list names may be NaN."""
    step, count = make_step(positions, 128, device), len(positions)
    for kind in (CSA, HCA):
        width = kind.width(256)
        lists = torch.full((count, width), 1 << 30, dtype=torch.int32, device=device)
        naive_row_lists(step, kind, lists, make_selected(step, CSA) if kind is CSA else None)
        lengths = kind.lengths(step.positions)
        used = lists[torch.arange(width, device=device) < lengths.unsqueeze(1)]
        rows = step.num_window_rows + step.num_window_rows // kind.ratio
        pool = fill_pool(FP8_584_ROW, rows, used, device, spread=40.0)
        found = torch.full((count * width, 512), -3.0, dtype=torch.bfloat16, device=device)
        expected = found.clone()
        row_gather(pool, FP8_584_ROW, lists, kind, step.positions, found)
        naive_row_gather(pool, FP8_584_ROW, lists, lengths, expected)
        assert torch.equal(found, expected), kind.name
    try:
        row_gather(pool, BF16_ROW, lists, kind, step.positions, found)
    except ValueError as fault:
        assert "expected fp8_584 rows" in str(fault)
    else:
        raise AssertionError("bf16 rows were taken")


def check_small(device="cpu"):
    """Lists of every length around a window."""
    gathers([-1, 0, 3, 62, 128], device)


def check_more_lists(device="cpu"):
    """Lists around blocks, tiles and pages."""
    gathers(POSITIONS[:12], device)


SMALL = (check_small,)
CHECKS = (check_more_lists,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture):
    arguments = {
        "p_pool": "*u8",
        "p_positions": "*i64",
        "p_lists": "*i32",
        "list_stride": "i32",
        "width": "i32",
        "p_rows": "*bf16",
    }
    constants = KIND | {"FORMAT": store_format(FP8_584_ROW), "D": 512, "BC": 8, "CASTS": architecture >= 89}
    assert machine_code(row_gather_kernel, arguments, constants, architecture, 4)
