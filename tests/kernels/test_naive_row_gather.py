"""Gathered rows against rows loaded one by one."""

import torch

from dsv4_kernels.layout import FP8_584_ROW
from dsv4_kernels.row_codec import naive_load_rows
from dsv4_kernels.row_gather import naive_row_gather
from tests.kernels.attention_world import fill_pool


def test_rows_lie_where_their_lists_name_them():
    lists = torch.tensor([[5, 70, 3], [9, 1 << 30, 1 << 30], [8, 2, 1 << 30]], dtype=torch.int32)
    pool = fill_pool(FP8_584_ROW, 128, torch.tensor([5, 70, 3, 8, 2]), spread=30.0)
    rows = torch.full((9, 512), -7.0, dtype=torch.bfloat16)
    naive_row_gather(pool, FP8_584_ROW, lists, torch.tensor([3, 0, 2]), rows)
    for place, slot in ((0, 5), (1, 70), (2, 3), (6, 8), (7, 2)):
        expected = naive_load_rows(pool, torch.tensor([slot]), FP8_584_ROW)[0]
        assert torch.equal(rows[place].float(), expected), "e4m3 times a power of two is a bf16 number"
    assert (rows[[3, 4, 5, 8]] == -7).all()
