"""Decoded pages: the reference against rows loaded one by one, the kernel against the reference."""

import itertools

import pytest
import torch

from dsv4_kernels.layout import BF16_ROW, FP8_584_ROW
from dsv4_kernels.page_decode import naive_page_decode, num_page_rows
from dsv4_kernels.page_decode.fused import _ROWS, page_decode, page_decode_kernel
from dsv4_kernels.row_codec import naive_load_rows
from dsv4_kernels.row_codec.fused import store_format
from tests.kernels.attention_world import fill_pool
from tests.kernels.compiling import ARCHITECTURES, machine_code
from tests.kernels.interpreting import interpreted_checks


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


def decodes(shapes, device):
    """Pages in no order, to the bit; whatever lies in others may be NaN, and so may rows within that were never stored."""
    num_window_rows, wrong = 4 * 256, 0
    for page_tokens, ratio, stored in shapes:
        per_page = page_tokens // ratio if ratio else 0
        for window, history in (([2, 0], [5, 1, 6]), ([1], []), ([], [0, 3]), ([], [])):
            pages = [torch.tensor(part, dtype=torch.int64) for part in (window, history)]
            window_slots = pages[0].unsqueeze(1) * page_tokens + torch.arange(page_tokens)
            slots = pages[1].unsqueeze(1) * per_page + torch.arange(per_page)
            used = torch.cat([window_slots.flatten(), num_window_rows + slots.flatten()])
            used = used[torch.rand(len(used)) < stored]
            rows = num_window_rows + 7 * per_page
            pool = fill_pool(FP8_584_ROW, rows, used, device, spread=40.0)
            pages = [part.to(device) for part in pages]
            count = num_page_rows(len(window), len(history), page_tokens, ratio)
            found = torch.full((count + 3, 512), -3.0, dtype=torch.bfloat16, device=device)
            expected = found.clone()
            shape = (page_tokens, ratio, num_window_rows)
            page_decode(pool, FP8_584_ROW, *pages, *shape, found[:count])
            naive_page_decode(pool, FP8_584_ROW, *pages, *shape, expected[:count])
            missing = expected.isnan()
            assert missing.any() == (len(used) < count), (page_tokens, ratio, window)
            assert torch.equal(found.isnan(), missing), (page_tokens, ratio, window)
            same = torch.equal(found[~missing], expected[~missing])
            assert same, (page_tokens, ratio, window)
            if count and stored == 1.0:
                page_decode(pool, FP8_584_ROW, pages[0].flip(0), pages[1].flip(0), *shape, found[:count])
                wrong += not torch.equal(found, expected)
    assert wrong, "another order of pages was not seen"
    for fmt, rows, text in ((BF16_ROW, 256, "expected fp8_584 rows"), (FP8_584_ROW, 3, "rows: ")):
        one, none = pages[0].new_zeros(1), pages[0].new_zeros(0)
        try:
            page_decode(pool, fmt, one, none, 256, 4, num_window_rows, found.new_zeros(rows, 512))
        except ValueError as fault:
            assert text in str(fault)
        else:
            raise AssertionError(f"taken: {text}")


def check_small(device="cpu"):
    """A CSA layer's pages, and an HCA layer's of which rows were never stored."""
    decodes([(128, 4, 1.0), (128, 128, 0.6)], device)


def check_every_layer(device="cpu"):
    """Every kind of layer and page."""
    decodes(itertools.product((128, 256), (0, 4, 128), (1.0, 0.6)), device)


SMALL = (check_small,)
CHECKS = (check_every_layer,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("per_page", [0, 2, 64])
def test_machine_code(architecture, per_page):
    arguments = {
        "p_pool": "*u8",
        "p_window_pages": "*i64",
        "p_history_pages": "*i64",
        "num_rows": "i32",
        "window_end": "i32",
        "num_window_rows": "i32",
        "p_rows": "*bf16",
    }
    constants = {
        "PAGE": 256,
        "PER_PAGE": per_page,
        "FORMAT": store_format(FP8_584_ROW),
        "D": 512,
        "BR": _ROWS,
        "CASTS": architecture >= 89,
    }
    assert machine_code(page_decode_kernel, arguments, constants, architecture, 4)
