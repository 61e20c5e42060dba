"""Fused gather: the listed rows are decoded in registers."""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import check_contiguous, check_rows, hardware_casts
from dsv4_kernels.layout import FP8_584_ROW, RowFormat
from dsv4_kernels.row_codec.fused import decode_rows, store_format
from dsv4_kernels.row_lists.kind import ListKind


@triton.jit(do_not_specialize=["list_stride", "width"])
def row_gather_kernel(
    p_pool,
    p_positions,
    p_lists,
    list_stride,
    width,
    p_rows,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    MOST: tl.constexpr,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    BC: tl.constexpr,
    CASTS: tl.constexpr,
):
    """``BC`` rows of one list."""
    i_t = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    b_position = tl.load(p_positions + i_t)
    b_length = tl.minimum(b_position + 1, WINDOW)
    if RATIO > 0:
        b_length += tl.minimum((b_position + 1) // RATIO, MOST)
    m_c = o_c < b_length
    b_slot = tl.load(p_lists + i_t * list_stride + o_c, mask=m_c, other=0).to(tl.int64)
    decode_rows(p_pool, b_slot, m_c, p_rows + (i_t * width + o_c) * D, FORMAT, D, CASTS)


def row_gather(
    pool: torch.Tensor, pool_format: RowFormat, lists: torch.Tensor, kind: ListKind, positions: torch.Tensor, rows: torch.Tensor
) -> None:
    """`naive_row_gather` in one launch, of lists whose lengths are ``kind``'s at ``positions``; fp8_584 pools, bf16 rows.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: rows.
    """
    check_rows("lists", lists)
    for name, tensor in (("pool", pool), ("positions", positions), ("rows", rows)):
        check_contiguous(name, tensor)
    if pool_format is not FP8_584_ROW or rows.dtype != torch.bfloat16:
        raise ValueError(f"row_gather: expected fp8_584 rows into bf16, got {pool_format.name} into {rows.dtype}")
    num_tokens, width = lists.shape
    if num_tokens == 0:
        return
    block = 8
    row_gather_kernel[(num_tokens, triton.cdiv(width, block))](
        p_pool=pool,
        p_positions=positions,
        p_lists=lists,
        list_stride=lists.stride(0),
        width=width,
        p_rows=rows,
        WINDOW=kind.window,
        RATIO=kind.ratio,
        MOST=(1 << 40) if kind.most is None else kind.most,
        FORMAT=store_format(pool_format),
        D=pool_format.dim,
        BC=block,
        CASTS=hardware_casts(pool.device),
        num_warps=4,
    )
