"""Fused decoding of pages: every row is loaded once, decoded in registers, and stored once."""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import check_contiguous, hardware_casts
from dsv4_kernels.layout import FP8_584_ROW, RowFormat
from dsv4_kernels.page_decode.naive import num_page_rows
from dsv4_kernels.row_codec.fused import decode_rows, store_format

# Rows of a program: 16 bytes of values a thread and load, and every load of a program under way at once.
_ROWS, _WARPS = 16, 4


@triton.jit(do_not_specialize=["num_rows", "window_end", "num_window_rows"])
def page_decode_kernel(
    p_pool,
    p_window_pages,
    p_history_pages,
    num_rows,
    window_end,
    num_window_rows,
    p_rows,
    PAGE: tl.constexpr,
    PER_PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    CASTS: tl.constexpr,
):
    """``BR`` rows, of which those before ``window_end`` are window rows. ``PER_PAGE``: entries of a page; 0 without any."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    m_r = o_r < num_rows
    m_window = m_r & (o_r < window_end)
    b_slot = tl.load(p_window_pages + o_r // PAGE, mask=m_window, other=0) * PAGE + o_r % PAGE
    if PER_PAGE > 0:
        o_e = o_r - window_end
        b_page = tl.load(p_history_pages + o_e // PER_PAGE, mask=m_r & (o_e >= 0), other=0)
        b_slot = tl.where(m_window, b_slot, num_window_rows + b_page * PER_PAGE + o_e % PER_PAGE)
    decode_rows(p_pool, b_slot, m_r, p_rows + o_r * D, FORMAT, D, CASTS)


def page_decode(
    pool: torch.Tensor,
    pool_format: RowFormat,
    window_pages: torch.Tensor,
    history_pages: torch.Tensor,
    page_tokens: int,
    ratio: int,
    num_window_rows: int,
    rows: torch.Tensor,
) -> None:
    """`naive_page_decode` in one launch; fp8_584 pools, bf16 rows.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: rows.

    Raises:
        ValueError: another format, or rows of another number or shape than the pages have; nothing was written.
    """
    named = {"pool": pool, "window_pages": window_pages, "history_pages": history_pages, "rows": rows}
    for name, tensor in named.items():
        check_contiguous(name, tensor)
    if pool_format is not FP8_584_ROW or rows.dtype != torch.bfloat16:
        raise ValueError(f"page_decode: expected fp8_584 rows into bf16, got {pool_format.name} into {rows.dtype}")
    num_rows = num_page_rows(len(window_pages), len(history_pages), page_tokens, ratio)
    if tuple(rows.shape) != (num_rows, pool_format.dim):
        raise ValueError(f"rows: expected ({num_rows}, {pool_format.dim}), got {tuple(rows.shape)}")
    if num_rows == 0:
        return
    page_decode_kernel[(triton.cdiv(num_rows, _ROWS),)](
        p_pool=pool,
        p_window_pages=window_pages,
        p_history_pages=history_pages,
        num_rows=num_rows,
        window_end=len(window_pages) * page_tokens,
        num_window_rows=num_window_rows,
        p_rows=rows,
        PAGE=page_tokens,
        PER_PAGE=page_tokens // ratio if ratio else 0,
        FORMAT=store_format(pool_format),
        D=pool_format.dim,
        BR=_ROWS,
        CASTS=hardware_casts(pool.device),
        num_warps=_WARPS,
    )
