"""Decoded pages against rows loaded one by one."""

import pytest
import torch

from dsv4_kernels.layout import FP8_584_ROW
from dsv4_kernels.page_decode import naive_page_decode, num_page_rows
from dsv4_kernels.row_codec import naive_load_rows
from tests.kernels.attention_world import fill_pool


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_pages_lie_one_after_another(ratio):
    page_tokens, num_window_rows = 128, 3 * 128
    per_page = page_tokens // ratio if ratio else 0
    window, history = torch.tensor([2, 0]), torch.tensor([4, 1, 3])
    expected = [page * page_tokens + i for page in (2, 0) for i in range(page_tokens)]
    expected += [num_window_rows + page * per_page + i for page in (4, 1, 3) for i in range(per_page)]
    used = torch.tensor(expected)
    pool = fill_pool(FP8_584_ROW, num_window_rows + 5 * per_page, used, spread=30.0)
    assert num_page_rows(2, 3, page_tokens, ratio) == len(expected)
    rows = torch.full((len(expected), 512), -7.0, dtype=torch.bfloat16)
    naive_page_decode(pool, FP8_584_ROW, window, history, page_tokens, ratio, num_window_rows, rows)
    for place, slot in enumerate(expected):
        one = naive_load_rows(pool, torch.tensor([slot]), FP8_584_ROW)[0]
        assert torch.equal(rows[place].float(), one), "e4m3 times a power of two is a bf16 number"


def test_no_pages():
    pool = fill_pool(FP8_584_ROW, 128, torch.tensor([0]))
    none, rows = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 512, dtype=torch.bfloat16)
    naive_page_decode(pool, FP8_584_ROW, none, none, 128, 4, 128, rows)
    assert num_page_rows(0, 0, 128, 4) == 0 == num_page_rows(0, 9, 128, 0)
