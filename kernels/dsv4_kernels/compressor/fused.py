"""What the fused flushes of CSA and HCA layers share: pooling, and the end of every entry.

A token of position -1 is padding, as is a request with ``extend_len`` 0. Which specialisation of a kernel runs depends
on shapes alone. Every sum has a fixed order, and products are fused into sums only where the code says so: all
specialisations give an entry the same bytes.

Pooling is per channel, in the reference's order of slots and tokens. ``exp(x)`` is ``exp2(x log2(e))``: against the
reference a pooled value differs by the rounding of a few exponentials, about 1e-6 of its row.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.compressor.naive import LOWEST
from dsv4_kernels.compressor.params import CompressorParams
from dsv4_kernels.device import check_contiguous, check_rows
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.norm_rope.fused import store_normed
from dsv4_kernels.row_codec.fused import StoreFormat, store_format
from dsv4_kernels.step import StepTensors

# Requests whose lengths are added up at once to find a request's first token.
_SCAN = tl.constexpr(256)


class CompressorPointers(NamedTuple):
    """One compressor's tensors inside a kernel; ``state`` is the streams or the accumulators."""

    kv_score: torch.Tensor
    state: torch.Tensor
    boundary: torch.Tensor | None
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


LOWEST_GATE = tl.constexpr(LOWEST)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp_of_difference(b_x, b_y):
    """``exp(x - y)``."""
    return tl.exp2((b_x - b_y) * _LOG2E)


@triton.jit
def csa_pool(kv, gate):
    """Pool a tuple of rows ``[D]`` by one softmax of their gates; an absent row has gate -inf and kv 0."""
    b_maximum = gate[0]
    for j in tl.static_range(1, len(gate)):
        b_maximum = tl.maximum(b_maximum, gate[j])
    b_total = exp_of_difference(gate[0], b_maximum)
    b_pooled = b_total * kv[0]
    for j in tl.static_range(1, len(gate)):
        b_weight = exp_of_difference(gate[j], b_maximum)
        b_total += b_weight
        b_pooled = tl.fma(b_weight, kv[j], b_pooled)
    return b_pooled / b_total


@triton.jit
def hca_update(b_maximum, b_total, b_pooled, b_kv, b_gate):
    """Take one token into an accumulator.

    One exponential serves both factors: of ``exp(M - M')`` and ``exp(gate - M')`` one is always 1. It is taken of the
    difference itself, which a gate of NaN makes NaN; maximum and minimum would pass over it.
    """
    b_new_maximum = tl.maximum(b_maximum, b_gate)
    b_decay = tl.exp2(tl.abs(b_maximum - b_gate) * -_LOG2E)
    m_larger = b_gate > b_maximum
    b_keep = tl.where(m_larger, b_decay, 1.0)
    b_weight = tl.where(m_larger, 1.0, b_decay)
    b_pooled = tl.fma(b_weight, b_kv, b_pooled * b_keep)
    return b_new_maximum, tl.fma(b_total, b_keep, b_weight), b_pooled


@triton.jit
def hca_finish(b_maximum, b_total, b_pooled):
    """The pooled row of a closed block: NaN where a gate was +inf, as the reference's exp(inf - inf) is."""
    return tl.where(b_maximum < float("inf"), b_pooled / b_total, float("nan"))


@triton.jit
def first_token_of(step, row, num_tokens):
    """Number of tokens of the requests before ``row``."""
    # Where every request has one token, token ``row`` opens request ``row``: seen at once, by exact comparison.
    here = tl.load(step.token_rows + row, mask=row < num_tokens, other=-1)
    before = tl.load(step.token_rows + row - 1, mask=(row > 0) & (row <= num_tokens), other=-1)
    first_token = row.to(tl.int32)
    if (here != row) | (before == row):
        b_sum = tl.zeros([_SCAN], tl.int32)  # [SCAN]
        for first in tl.range(0, row, _SCAN, loop_unroll_factor=1):
            o_r = first + tl.arange(0, _SCAN)
            b_sum += tl.load(step.extend_lens + o_r, mask=o_r < row, other=0).to(tl.int32)
        first_token = tl.sum(b_sum, axis=0)
    return first_token


@triton.jit
def store_entries(
    chunks, step, comp, b_row, b_first, m_e, page_stride, first_row, eps, S: tl.constexpr, E: tl.constexpr, CASTS: tl.constexpr
):
    """Norm, rotate and store the pooled rows of the blocks whose first positions are ``b_first`` ``[E]``."""
    PER_PAGE: tl.constexpr = S.page_tokens // S.ratio
    STORE: tl.constexpr = S.store
    b_entry = b_first // S.ratio  # [E]
    b_page = tl.load(step.history_pages + b_row * page_stride + b_entry // PER_PAGE, mask=m_e, other=0)
    b_slot = first_row + b_page * PER_PAGE + b_entry % PER_PAGE
    p_cos_sin = comp.cos_sin + b_first.to(tl.int64) * S.rope_dim  # [E], rows of the table
    store_normed(chunks, comp.norm_weight, eps, p_cos_sin, comp.pool, b_slot, m_e, E, S.dim, S.rope_dim, S.rotate, STORE, CASTS)


def compressor_arguments(
    step: StepTensors,
    kv_score: torch.Tensor,
    state: torch.Tensor,
    boundary: torch.Tensor | None,
    pool: torch.Tensor,
    pool_format: RowFormat,
    params: CompressorParams,
    ratio: int,
) -> tuple[CompressorPointers, CompressorShape]:
    """A compressor as kernel arguments and constants; ``state`` is its streams or its accumulators, which have no boundary."""
    check_rows("kv_score", kv_score)
    for name, tensor in (("state", state), ("boundary", boundary), ("pool", pool), ("cos_sin", params.cos_sin)):
        if tensor is not None:
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
