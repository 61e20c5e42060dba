"""What the fused flushes of CSA and HCA layers share: their view of a step, and the end of every entry.

A token of position -1 is padding, as is a request with ``extend_len`` 0. Which specialisation of a kernel runs depends
on shapes alone. Every sum has a fixed order, and products are fused into sums only where the code says so: all
specialisations give an entry the same bytes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import check_contiguous, check_rows
from dsv4_kernels.flush.naive import CompressorParams
from dsv4_kernels.hadamard.fused import hadamard_rows
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.norm_rope.fused import load_rope, norm_scale, rope_chunk
from dsv4_kernels.row_codec.fused import StoreFormat, store_chunk, store_format
from dsv4_kernels.step import StepTensors

# Requests whose lengths are added up at once to find a request's first token.
SCAN = 256


class StepPointers(NamedTuple):
    """`StepTensors` inside a kernel."""

    positions: torch.Tensor
    token_rows: torch.Tensor
    seq_lens: torch.Tensor
    extend_lens: torch.Tensor
    state_slots: torch.Tensor
    history_pages: torch.Tensor
    window_pages: torch.Tensor


class CompressorPointers(NamedTuple):
    """One compressor's tensors inside a kernel; ``state`` is the streams or the accumulators."""

    kv_score: torch.Tensor
    state: torch.Tensor
    boundary: torch.Tensor
    pool: torch.Tensor
    slot_bias: torch.Tensor
    norm_weight: torch.Tensor
    cos_sin: torch.Tensor


@dataclass(frozen=True)
class CompressorShape:
    """One compressor's compile-time constants."""

    dim: int
    rope_dim: int
    ratio: int
    token_stride: int
    ring: int
    page_tokens: int
    rotate: bool
    store: StoreFormat


@triton.jit
def first_token_of(step, row, num_tokens, BR: tl.constexpr):
    """Number of tokens of the requests before ``row``."""
    # Where every request has one token, token ``row`` opens request ``row``: seen at once, by exact comparison.
    here = tl.load(step.token_rows + row, mask=row < num_tokens, other=-1)
    before = tl.load(step.token_rows + row - 1, mask=(row > 0) & (row <= num_tokens), other=-1)
    first_token = row.to(tl.int32)
    if (here != row) | (before == row):
        b_sum = tl.zeros([BR], tl.int32)
        for first in tl.range(0, row, BR, loop_unroll_factor=1):
            o_r = first + tl.arange(0, BR)
            b_sum += tl.load(step.extend_lens + o_r, mask=o_r < row, other=0).to(tl.int32)
        first_token = tl.sum(b_sum, axis=0)
    return first_token


@triton.jit
def store_normed(
    chunks,
    p_weight,
    eps,
    p_cos_sin,
    p_pool,
    b_slot,
    m_e,
    E: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    ROTATE: tl.constexpr,
    FORMAT: tl.constexpr,
    CASTS: tl.constexpr,
):
    """Norm, rotate and store rows, a tuple of chunks ``[E, C]``; ``p_cos_sin`` ``[E]`` is each row's row of the table."""
    C: tl.constexpr = D // len(chunks)
    # All loads before the norm: it makes threads wait for each other, and no load may be moved over that.
    LAST: tl.constexpr = D - C  # the rotated channels are in the last chunk
    b_cos, b_sin = load_rope(p_cos_sin, m_e, LAST, C, D, R)
    weights = ()
    for c in tl.static_range(len(chunks)):
        weights = weights + (tl.load(p_weight + c * C + tl.arange(0, C)).to(tl.float32),)
    b_scale = norm_scale(chunks, eps, E, D)[:, None]
    for c in tl.static_range(len(chunks)):
        b_x = chunks[c] * b_scale * weights[c][None, :]
        if c * C == LAST:
            b_x = rope_chunk(b_x, b_cos, b_sin, LAST, E, C, D, R)
        if ROTATE:
            b_x = hadamard_rows(b_x, E, D, D**-0.5)  # an index key is one chunk
        store_chunk(p_pool, b_slot, b_x, m_e, c * C, FORMAT, E, C, D, CASTS)


@triton.jit
def store_entries(
    chunks, step, comp, b_row, b_first, m_e, page_stride, first_row, eps, S: tl.constexpr, E: tl.constexpr, CASTS: tl.constexpr
):
    """Norm, rotate and store the pooled rows of the blocks whose first positions are ``b_first`` ``[E]``."""
    PER_PAGE: tl.constexpr = S.page_tokens // S.ratio
    STORE: tl.constexpr = S.store
    b_entry = b_first // S.ratio
    b_page = tl.load(step.history_pages + b_row * page_stride + b_entry // PER_PAGE, mask=m_e, other=0)
    b_slot = first_row + b_page * PER_PAGE + b_entry % PER_PAGE
    p_cos_sin = comp.cos_sin + b_first.to(tl.int64) * S.rope_dim
    store_normed(chunks, comp.norm_weight, eps, p_cos_sin, comp.pool, b_slot, m_e, E, S.dim, S.rope_dim, S.rotate, STORE, CASTS)


def step_pointers(step: StepTensors) -> StepPointers:
    """A step as kernel arguments; raises `ValueError` where a tensor is laid out otherwise than kernels expect."""
    for name in ("positions", "token_rows", "seq_lens", "extend_lens", "state_slots"):
        check_contiguous(name, getattr(step, name))
    if step.history_pages.stride() != step.window_pages.stride() or step.history_pages.stride(-1) != 1:
        raise ValueError(
            f"page tables: expected equal strides, the last 1, got {step.history_pages.stride()} and "
            f"{step.window_pages.stride()}"
        )
    return StepPointers(
        step.positions,
        step.token_rows,
        step.seq_lens,
        step.extend_lens,
        step.state_slots,
        step.history_pages,
        step.window_pages,
    )


def compressor_arguments(
    step: StepTensors,
    kv_score: torch.Tensor,
    state: torch.Tensor,
    boundary: torch.Tensor,
    pool: torch.Tensor,
    pool_format: RowFormat,
    params: CompressorParams,
    ratio: int,
) -> tuple[CompressorPointers, CompressorShape]:
    """A compressor as kernel arguments and constants; ``state`` is its streams or its accumulators."""
    check_rows("kv_score", kv_score)
    for name, tensor in (("state", state), ("boundary", boundary), ("pool", pool), ("cos_sin", params.cos_sin)):
        check_contiguous(name, tensor)
    dim = params.norm_weight.shape[0]
    pointers = CompressorPointers(kv_score, state, boundary, pool, params.slot_bias, params.norm_weight, params.cos_sin)
    shape = CompressorShape(
        dim=dim,
        rope_dim=params.cos_sin.shape[1],
        ratio=ratio,
        token_stride=kv_score.stride(0),
        ring=state.shape[1],
        page_tokens=step.page_tokens,
        rotate=params.rotate,
        store=store_format(pool_format),
    )
    return pointers, shape
