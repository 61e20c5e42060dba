"""Fused merge, sink and inverse RoPE: each value is read once and written once."""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import check_contiguous, hardware_casts, zero_like
from dsv4_kernels.row_codec.fused import round_to_bf16
from dsv4_kernels.sink_rope.splits import Splits
from dsv4_kernels.sink_rope.tuning import sink_rope_tuning

_LOWEST = tl.constexpr(-1e30)  # finite: an empty piece's -inf less this is -inf, and no NaN


@triton.jit
def _store(p_x, b_x, mask, CASTS: tl.constexpr):
    if p_x.dtype.element_ty == tl.bfloat16:
        tl.store(p_x, round_to_bf16(b_x, CASTS), mask=mask)
    else:
        tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def _add_piece(b_acc, b_scale, p_x, b_weight, mask):
    """``b_acc * b_scale`` and a piece by its weight ``[H, 1]``; a piece of weight 0 may hold anything."""
    b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    return b_acc * b_scale + tl.where(b_weight > 0, b_x * b_weight, 0.0)


@triton.jit(do_not_specialize=["num_heads"])
def sink_rope_kernel(
    p_out,
    p_lse,
    p_sink,
    p_positions,
    p_cos_sin,
    splits,
    num_heads,
    D: tl.constexpr,
    R: tl.constexpr,
    RB: tl.constexpr,
    BH: tl.constexpr,
    BJ: tl.constexpr,
    CASTS: tl.constexpr,
):
    """``BH`` heads of one query; pieces are read ``BJ`` at a time. Channels that stay as they are are not touched.

    A vector of heads is a column ``[BH, 1]``, so that it is laid out as the rows are and no exchange through
    shared memory stands between two loads.
    """
    LN2: tl.constexpr = 0.6931471805599453
    LOG2E: tl.constexpr = 1.4426950408889634
    WHOLE: tl.constexpr = (p_sink is not None) or (splits is not None)
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)[:, None]  # [BH, 1]
    m_h = o_h < num_heads
    o_d = tl.arange(0, D)[None, :]  # [1, D]
    o_r = tl.arange(0, RB)[None, :]  # [1, RB]
    m_d = m_h & (o_d < D - R)
    m_r = m_h & (o_r < R)
    # Strides are multiples of D, a constant, which lets the compiler load 16 bytes at once.
    p_head = p_out + (i_t * num_heads + o_h) * D
    b_main = tl.zeros([BH, D], tl.float32)
    b_pair = tl.zeros([BH, RB], tl.float32)
    b_lse = tl.zeros([BH, 1], tl.float32)
    b_count = 1
    if splits is not None:
        b_count = tl.load(splits.num_pieces + i_t)
        b_lane = tl.load(splits.first_lane + i_t)
    if b_count == 1:
        if WHOLE:
            b_main = tl.load(p_head + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_lse = tl.load(p_lse + i_t * num_heads + o_h, mask=m_h, other=0.0) * LOG2E
        if R > 0:
            b_pair = tl.load(p_head + (D - R) + o_r, mask=m_r, other=0.0).to(tl.float32)
    elif splits is not None:
        b_top = tl.full([BH, 1], _LOWEST, tl.float32)
        b_sum = tl.zeros([BH, 1], tl.float32)
        for i_j in range(0, b_count, BJ):
            for j in tl.static_range(BJ):
                m_j = m_h & (i_j + j < b_count)
                b_piece = zero_like(b_lane) + i_j + j
                b_slot = 2 * (b_lane + b_piece) + (b_piece == 0).to(tl.int32)
                o_row = b_slot.to(tl.int64) * num_heads + o_h  # [BH, 1]
                b_part = tl.load(splits.partial_lse + o_row, mask=m_j, other=float("-inf"))
                b_new = tl.maximum(b_top, b_part)
                b_scale = tl.exp2(b_top - b_new)
                b_weight = tl.exp2(b_part - b_new)
                p_row = splits.partial + o_row * D
                b_main = _add_piece(b_main, b_scale, p_row + o_d, b_weight, m_j & (o_d < D - R))
                if R > 0:
                    b_pair = _add_piece(b_pair, b_scale, p_row + (D - R) + o_r, b_weight, m_j & (o_r < R))
                b_sum = b_sum * b_scale + b_weight
                b_top = b_new
        b_inverse = tl.where(b_sum > 0, 1.0 / b_sum, 0.0)
        b_main = b_main * b_inverse
        b_pair = b_pair * b_inverse
        b_lse = tl.where(b_sum > 0, b_top + tl.log2(b_sum), float("-inf"))
    if p_sink is not None:
        b_sink = tl.load(p_sink + o_h, mask=m_h, other=0.0).to(tl.float32)
        # -inf less -inf is no number; a query without keys has no weight to give.
        b_weight = tl.where(b_lse == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp(b_sink - b_lse * LN2)))
        b_main = tl.where(b_weight > 0, b_main * b_weight, 0.0)
        b_pair = tl.where(b_weight > 0, b_pair * b_weight, 0.0)
    if R > 0:
        b_position = tl.load(p_positions + i_t)
        o_p = tl.arange(0, RB // 2)
        m_p = (o_p < R // 2) & (b_position >= 0)
        b_cos = tl.load(p_cos_sin + b_position * R + o_p, mask=m_p, other=1.0)[None, :]
        b_sin = tl.load(p_cos_sin + b_position * R + R // 2 + o_p, mask=m_p, other=0.0)[None, :]
        b_even, b_odd = tl.split(tl.reshape(b_pair, [BH, RB // 2, 2]))  # [BH, RB/2]
        b_pair = tl.join(b_even * b_cos + b_odd * b_sin, b_odd * b_cos - b_even * b_sin)
        _store(p_head + (D - R) + o_r, tl.reshape(b_pair, [BH, RB]), m_r, CASTS)
    if WHOLE:
        _store(p_head + o_d, b_main, m_d, CASTS)


def sink_rope(
    out: torch.Tensor,
    lse: torch.Tensor,
    sink: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    splits: Splits | None = None,
) -> None:
    """`naive_sink_rope` in one launch; arguments as there.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: out.
    """
    num_tokens, num_heads, dim = out.shape
    for name, tensor in (("out", out), ("lse", lse), ("positions", positions)):
        check_contiguous(name, tensor)
    if num_tokens == 0:
        return
    heads, pieces, warps = sink_rope_tuning(num_tokens, 0 if splits is None else len(splits.partial) // 2)
    sink_rope_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        p_out=out,
        p_lse=lse,
        p_sink=sink,
        p_positions=positions,
        p_cos_sin=cos_sin,
        splits=splits,
        num_heads=num_heads,
        D=dim,
        R=0 if cos_sin is None else cos_sin.shape[1],
        RB=2 if cos_sin is None else cos_sin.shape[1],
        BH=heads,
        BJ=pieces,
        CASTS=hardware_casts(out.device),
        num_warps=warps,
    )
