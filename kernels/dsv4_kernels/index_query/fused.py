"""Rotated index queries of a step, and the numbering of its tiles of scores, in one launch."""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import EXACT, hardware_casts, zero_like
from dsv4_kernels.hadamard.fused import hadamard_rows
from dsv4_kernels.norm_rope.fused import load_rope, rope_chunk
from dsv4_kernels.row_codec.fused import quantize_e4m3, round_to_bf16
from dsv4_kernels.step import StepTensors

# Units whose tiles are counted at once.
COUNTED_UNITS = 256
# Query rows of one program.
_ROWS = 16


@triton.jit
def scored_entries(p_positions, b_token, m_t, RATIO: tl.constexpr, K: tl.constexpr):
    """Entries that tokens see, or 0 where nothing is to be chosen."""
    b_position = tl.load(p_positions + b_token, mask=m_t, other=-1)
    b_visible = ((b_position + 1) // RATIO).to(tl.int32)
    return tl.where(b_visible > K, b_visible, 0)


@triton.jit
def count_tiles(
    p_positions,
    first_token,
    num_tokens,
    p_first_tiles,
    RATIO: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    BS: tl.constexpr,
    BU: tl.constexpr,
):
    """Number the tiles: each unit's first, and behind the last unit the number of all."""
    num_units = tl.cdiv(num_tokens, UNIT)
    tl.store(p_first_tiles, 0)
    counted = zero_like(num_tokens)
    for first in range(0, num_units, BU):
        o_u = first + tl.arange(0, BU)
        o_t = o_u[:, None] * UNIT + tl.arange(0, UNIT)[None, :]  # [BU, UNIT]
        b_visible = scored_entries(p_positions, first_token + o_t, o_t < num_tokens, RATIO, K)
        b_tiles = (tl.max(b_visible, axis=1) + BS - 1) // BS  # [BU]
        tl.store(p_first_tiles + 1 + o_u, counted + tl.cumsum(b_tiles, axis=0), mask=o_u < num_units)
        counted += tl.sum(b_tiles, axis=0)


@triton.jit(do_not_specialize=["first_token", "num_tokens", "token_stride", "head_stride", "weight_stride"])
def index_query_kernel(
    p_positions,
    first_token,
    num_tokens,
    p_q,
    token_stride,
    head_stride,
    p_weights,
    weight_stride,
    p_cos_sin,
    p_query,
    p_scaled,
    p_first_tiles,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    SCALE: tl.constexpr,
    E: tl.constexpr,
    RATIO: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    BS: tl.constexpr,
    BU: tl.constexpr,
    CASTS: tl.constexpr,
):
    """``E`` heads of one token per program; the last program counts the tiles."""
    i_t = tl.program_id(0) // (H // E)
    if i_t == num_tokens:
        count_tiles(p_positions, first_token, num_tokens, p_first_tiles, RATIO, K, UNIT, BS, BU)
    else:
        token = (first_token + i_t).to(tl.int64)
        position = tl.load(p_positions + token)
        if (position + 1) // RATIO > K:
            o_h = tl.program_id(0) % (H // E) * E + tl.arange(0, E)  # [E]
            o_d = tl.arange(0, D)[None, :]
            m_h = o_h < HEADS
            p_row = p_q + token * token_stride + o_h * head_stride
            b_q = tl.load(p_row[:, None] + o_d, mask=m_h[:, None], other=0.0).to(tl.float32)
            p_angle = p_cos_sin + (zero_like(o_h) + position) * R
            b_cos, b_sin = load_rope(p_angle, m_h, 0, D, D, R)  # [E, D/2]
            b_q = hadamard_rows(rope_chunk(b_q, b_cos, b_sin, 0, E, D, D, R), E, D, SCALE)  # [E, D]
            b_w = tl.load(p_weights + token * weight_stride + o_h, mask=m_h, other=0.0).to(tl.float32)
            o_n = i_t.to(tl.int64) * H + o_h
            p_row = p_query + o_n[:, None] * D + o_d
            if p_query.dtype.element_ty == tl.uint8:
                b_byte, b_exponent = quantize_e4m3(tl.reshape(b_q, [E, 1, D]), CASTS)
                b_scale = ((tl.reshape(b_exponent, [E]) + 127) << 23).to(tl.float32, bitcast=True)
                tl.store(p_row, tl.reshape(b_byte, [E, D]))
                b_w = b_w * b_scale
            elif p_query.dtype.element_ty == tl.bfloat16:
                tl.store(p_row, round_to_bf16(b_q, CASTS))
            else:
                tl.store(p_row, b_q)
            tl.store(p_scaled + o_n, b_w)


def index_query(
    step: StepTensors,
    index_q: torch.Tensor,
    index_weights: torch.Tensor,
    cos_sin: torch.Tensor,
    ratio: int,
    k: int,
    query: torch.Tensor,
    weights: torch.Tensor,
    first_tiles: torch.Tensor,
    unit: int,
    tile: int,
    first_token: int,
    num_tokens: int,
) -> None:
    """`naive_index_query` for the tokens that have more than ``k`` visible entries.

    Args:
        step (StepTensors): the step.
        index_q (torch.Tensor): ``[T, heads, 128]``, fp32 or bf16.
        index_weights (torch.Tensor): ``[T, heads]``, fp32 or bf16.
        cos_sin (torch.Tensor): the RoPE table.
        ratio (int): tokens per entry.
        k (int): entries to choose; a token that sees no more is skipped.
        query (torch.Tensor): ``[N, padded heads, 128]``, fp32, bf16 or e4m3 as uint8, of tokens ``first_token ..``. Written;
            padded heads are 0.
        weights (torch.Tensor): ``[N, padded heads]``, fp32, weights times the scales of e4m3 queries. Written; 0 for padded
            heads.
        first_tiles (torch.Tensor): ``[units + 1]`` int32, tiles before each unit of ``unit`` tokens. Written.
        unit (int): tokens that share a tile, a power of two.
        tile (int): entries of a tile.
        first_token (int): the first of these tokens.
        num_tokens (int): their number.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: query, weights, first_tiles.
    """
    padded, dim = query.shape[1:]
    index_query_kernel[(num_tokens * (padded // _ROWS) + 1,)](
        p_positions=step.positions,
        first_token=first_token,
        num_tokens=num_tokens,
        p_q=index_q,
        token_stride=index_q.stride(0),
        head_stride=index_q.stride(1),
        p_weights=index_weights,
        weight_stride=index_weights.stride(0),
        p_cos_sin=cos_sin,
        p_query=query,
        p_scaled=weights,
        p_first_tiles=first_tiles,
        HEADS=index_q.shape[1],
        H=padded,
        D=dim,
        R=cos_sin.shape[1],
        SCALE=dim**-0.5,
        E=_ROWS,
        RATIO=ratio,
        K=k,
        UNIT=unit,
        BS=tile,
        BU=COUNTED_UNITS,
        CASTS=hardware_casts(index_q.device),
        num_warps=4,
        **EXACT,
    )
