"""Fused gather: the listed rows are decoded in registers."""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import check_contiguous, check_rows, hardware_casts
from dsv4_kernels.layout import FP8_584_ROW, RowFormat
from dsv4_kernels.row_codec.fused import round_to_bf16, store_format
from dsv4_kernels.row_lists.kind import ListKind


@triton.jit
def e4m3_to_fp32(b_byte, HARDWARE_CASTS: tl.constexpr):
    """Values of e4m3 bytes."""
    if HARDWARE_CASTS:
        return b_byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    b_bits = b_byte.to(tl.uint32)
    # Exponent and mantissa at their fp32 places, the bias put right by a product, which is exact, subnormals included.
    b_abs = ((b_bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    b_abs = tl.where((b_bits & 0x7F) == 0x7F, float("nan"), b_abs)
    return tl.where((b_bits & 0x80) != 0, -b_abs, b_abs)


@triton.jit(do_not_specialize=["list_stride", "width"])
def row_gather_kernel(
    p_pool, p_positions, p_lists, list_stride, width, p_rows, WINDOW: tl.constexpr, RATIO: tl.constexpr,
    MOST: tl.constexpr, FORMAT: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, CASTS: tl.constexpr,
):  # fmt: skip
    """``BC`` rows of one list."""
    i_t = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    b_position = tl.load(p_positions + i_t)
    b_length = tl.minimum(b_position + 1, WINDOW)
    if RATIO > 0:
        b_length += tl.minimum((b_position + 1) // RATIO, MOST)
    m_c = o_c < b_length
    b_slot = tl.load(p_lists + i_t * list_stride + o_c, mask=m_c, other=0).to(tl.int64)
    p_group = p_pool + (b_slot // FORMAT.group_rows) * FORMAT.group_bytes  # [BC]
    p_data = p_group + (b_slot % FORMAT.group_rows) * FORMAT.data_bytes
    p_scale = p_group + FORMAT.scale_offset + (b_slot % FORMAT.group_rows) * FORMAT.scale_bytes
    TILES: tl.constexpr = D // FORMAT.tile
    o_i = tl.arange(0, TILES)
    o_x = o_i[:, None] * FORMAT.tile + tl.arange(0, FORMAT.tile)[None, :]  # [TILES, tile]
    m_nope = m_c[:, None] & (o_i * FORMAT.tile < FORMAT.nope_dim)[None, :]  # [BC, TILES]
    b_byte = tl.load(p_data[:, None, None] + o_x[None, :, :], mask=m_nope[:, :, None], other=0)
    b_exponent = tl.load(p_scale[:, None] + o_i[None, :], mask=m_nope, other=127)
    b_factor = (b_exponent.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    b_x = e4m3_to_fp32(b_byte, CASTS) * b_factor[:, :, None]
    p_row = p_rows + (i_t * width + o_c)[:, None] * D
    p_x = p_row[:, :, None] + o_x[None, :, :]
    tl.store(p_x, round_to_bf16(b_x, CASTS), mask=m_nope[:, :, None])
    ROPE: tl.constexpr = D - FORMAT.nope_dim
    o_r = tl.arange(0, ROPE)[None, :]
    p_rope = (p_data + FORMAT.nope_dim).to(tl.pointer_type(tl.bfloat16))
    b_rope = tl.load(p_rope[:, None] + o_r, mask=m_c[:, None], other=0.0)
    tl.store(p_row + FORMAT.nope_dim + o_r, b_rope, mask=m_c[:, None])


def row_gather(
    pool: torch.Tensor,
    pool_format: RowFormat,
    lists: torch.Tensor,
    kind: ListKind,
    positions: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """`naive_row_gather` in one launch, of lists whose lengths are ``kind``'s at ``positions``; fp8_584 pools, bf16 rows.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: rows.
    """
    check_rows("lists", lists)
    for name, tensor in (("pool", pool), ("positions", positions), ("rows", rows)):
        check_contiguous(name, tensor)
    if pool_format is not FP8_584_ROW or rows.dtype != torch.bfloat16:
        raise ValueError(
            f"row_gather: expected fp8_584 rows into bf16, got {pool_format.name} into {rows.dtype}"
        )
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
