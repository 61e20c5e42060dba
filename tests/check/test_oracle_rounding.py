"""The oracle rounds rows as the cache stores them; the two were written apart from each other."""

import pytest
import torch

from dsv4_kernels.layout import ROW_FORMATS
from dsv4_kernels.row_codec.naive import naive_load_rows, naive_store_rows
from sglang_dsv4.check.rounding import ROUNDINGS


def awkward_rows() -> torch.Tensor:
    """``[N, 512]`` fp32: every magnitude, zeros, largest values at and beside powers of two times 448."""
    rows = torch.randn(64, 512) * torch.exp2(torch.randint(-30, 12, (64, 1)).float())
    rows[0] = 0.0
    rows[1, :448] = 448.0
    rows[2, :448] = 448.0 * (1 + 2.0**-20)
    rows[3, :448] = 3.5
    rows[4, ::2] = 0.0
    return rows


@pytest.mark.parametrize("name", sorted(ROUNDINGS))
def test_equal_to_storing_and_loading(name: str):
    rows, fmt = awkward_rows(), ROW_FORMATS[name]
    pool = torch.zeros(fmt.pool_shape(len(rows)), dtype=fmt.storage_dtype)
    slots = torch.randperm(len(rows))
    naive_store_rows(pool, slots, rows, fmt)
    assert torch.equal(ROUNDINGS[name](rows), naive_load_rows(pool, slots, fmt))


@pytest.mark.parametrize("name", sorted(ROUNDINGS))
def test_rounding_twice_is_rounding_once(name: str):
    once = ROUNDINGS[name](awkward_rows())
    assert torch.equal(ROUNDINGS[name](once), once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", sorted(ROUNDINGS))
def test_dtype_is_kept(name: str, dtype: torch.dtype):
    rows = torch.randn(2, 3, 512).to(dtype)
    rounded = ROUNDINGS[name](rows)
    assert rounded.dtype is dtype and rounded.shape == rows.shape


def test_every_format_of_the_cache_has_a_rounding():
    assert set(ROUNDINGS) == set(ROW_FORMATS)
