"""Fused flush: one launch takes a layer's new tokens into its streams and stores the entries that close.

A CSA layer's launch holds, for each of its two compressors, one program per request and one per ``m`` tokens. The
**request's program** owns everything that touches the request's stream rows: it pools the blocks that need rows of
earlier steps (of the step's blocks, at most the first two), and only then overwrites the ring. The **others** pool
blocks whose ``2*m`` rows are all new, and never read a stream. Both run the same code on rows from other addresses.
An HCA layer's launch splits likewise: the program of a request owns the block that continues the accumulator, and, if
there is such a block, the write of the accumulator too.

A token of position -1 is padding, as is a request with ``extend_len`` 0. Which specialisation runs depends on shapes
alone. Every sum has a fixed order and no product is fused into a sum, so all of them give an entry the same bytes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.compress.fused import csa_pool, hca_update
from dsv4_kernels.device import EXACT, check_contiguous, check_rows, hardware_casts
from dsv4_kernels.flush.naive import CompressorParams
from dsv4_kernels.hadamard.fused import hadamard_row
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.norm_rope.fused import rms_norm_row, rope_row
from dsv4_kernels.row_codec.fused import StoreFormat, store_format, store_row
from dsv4_kernels.step import StepTensors

# Requests whose lengths are added up at once to find a request's first token.
_SCAN = 256


@dataclass(frozen=True)
class CsaFlush:
    """Arguments of `naive_flush_csa` for one compressor, without the step."""

    kv_score: torch.Tensor
    streams: torch.Tensor
    boundary: torch.Tensor
    pool: torch.Tensor
    pool_format: RowFormat
    params: CompressorParams


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
    ring: int
    page_tokens: int
    rotate: bool
    hadamard_scale: float
    store: StoreFormat


@triton.jit
def first_token_of(p_extend_lens, row, BR: tl.constexpr):
    """Number of tokens of the requests before ``row``."""
    b_sum = tl.zeros([BR], tl.int64)
    for first in range(0, row, BR):
        o_r = first + tl.arange(0, BR)
        b_sum += tl.load(p_extend_lens + o_r, mask=o_r < row, other=0)
    return tl.sum(b_sum, axis=0)


@triton.jit
def store_entry(b_raw, step, comp, row, first, page_stride, first_row, eps, S: tl.constexpr, CASTS: tl.constexpr):
    """Norm, rotate and store the pooled row of the block whose first position is ``first``."""
    PER_PAGE: tl.constexpr = S.page_tokens // S.ratio
    STORE: tl.constexpr = S.store
    entry = first // S.ratio
    page = tl.load(step.history_pages + row * page_stride + entry // PER_PAGE)
    b_x = rms_norm_row(b_raw, comp.norm_weight, eps, S.dim)
    b_x = rope_row(b_x, comp.cos_sin + first * S.rope_dim, S.dim, S.rope_dim)
    if S.rotate:
        b_x = hadamard_row(b_x, S.dim, S.hadamard_scale)
    store_row(comp.pool, first_row + page * PER_PAGE + entry % PER_PAGE, b_x, STORE, S.dim, CASTS)


@triton.jit
def load_row(p_new, p_old, is_new, is_present, absent, o_d):
    """A row of this step's input or of the state; ``absent`` where there is none."""
    if p_new.dtype.element_ty == tl.float32:
        return tl.load(tl.where(is_new, p_new, p_old) + o_d, mask=is_present, other=absent)
    b_old = tl.load(p_old + o_d, mask=is_present & (is_new == 0), other=absent)
    b_new = tl.load(p_new + o_d, mask=is_present & is_new, other=0.0).to(tl.float32)
    return tl.where(is_new, b_new, b_old)


@triton.jit
def csa_block(
    step, comp, row, slot, position, token, start, token_stride, page_stride, first_row, eps,
    S: tl.constexpr, ALL_NEW: tl.constexpr, CASTS: tl.constexpr,
):  # fmt: skip
    """Pool and store the block that ``position`` closes; rows before position ``start`` come from the state."""
    M: tl.constexpr = S.ratio
    D: tl.constexpr = S.dim
    o_d = tl.arange(0, D)
    first = position - (M - 1)
    has_previous = first > 0
    # The previous block's rows of earlier steps: at a page's start from the boundary state, else from the ring.
    from_boundary = has_previous & (first % S.page_tokens == 0)
    page = first * 0
    if not ALL_NEW:
        page = tl.load(step.window_pages + row * page_stride + first // S.page_tokens - 1, mask=from_boundary, other=0)
    kv, gate = (), ()
    for j in tl.static_range(2 * M):
        q = position - (2 * M - 1) + j
        is_new = q >= start
        p_new = comp.kv_score + (token - (2 * M - 1) + j) * token_stride
        p_ring = comp.state + (slot * S.ring + q % S.ring) * (4 * D)
        if ALL_NEW:
            b_gate = tl.load(p_new + (2 + j // M) * D + o_d).to(tl.float32)
            b_kv = tl.load(p_new + j // M * D + o_d).to(tl.float32)
        elif j < M:
            p_page = comp.boundary + (page * M + j) * (2 * D)
            p_kv = tl.where(from_boundary, p_page, p_ring)
            p_gate = tl.where(from_boundary, p_page + D, p_ring + 2 * D)
            b_gate = load_row(p_new + 2 * D, p_gate, is_new, has_previous, float("-inf"), o_d)
            b_kv = load_row(p_new, p_kv, is_new, has_previous, 0.0, o_d)
        else:
            b_gate = load_row(p_new + 3 * D, p_ring + 3 * D, is_new, position >= 0, 0.0, o_d)
            b_kv = load_row(p_new + D, p_ring + D, is_new, position >= 0, 0.0, o_d)
        gate = gate + (b_gate + tl.load(comp.slot_bias + j * D + o_d),)
        kv = kv + (b_kv,)
    store_entry(csa_pool(kv, gate), step, comp, row, first, page_stride, first_row, eps, S, CASTS)
    if (position + 1) % S.page_tokens == 0:
        keep_boundary(step, comp, row, position - (M - 1), position + 1, token + 1, start, token_stride, page_stride, S)


@triton.jit
def keep_boundary(
    step, comp, row, first, end, token_end, start, token_stride, page_stride, S: tl.constexpr
):  # fmt: skip
    """Copy the b-stream of the new positions ``first .. end-1``, in a page's last block, to the boundary state."""
    o_d = tl.arange(0, S.dim)
    page = tl.load(step.window_pages + row * page_stride + first // S.page_tokens)
    for q in range(tl.maximum(first, start), end):
        p_row = comp.kv_score + (token_end - (end - q)) * token_stride
        p_page = comp.boundary + (page * S.ratio + q % S.ratio) * (2 * S.dim)
        b_kv = tl.load(p_row + o_d).to(tl.float32)
        b_gate = tl.load(p_row + 2 * S.dim + o_d).to(tl.float32)
        tl.store(p_page + o_d, b_kv)
        tl.store(p_page + S.dim + o_d, b_gate)


@triton.jit
def load_survivors(comp, part, start, seq_len, token_end, token_stride, S: tl.constexpr, BR: tl.constexpr):
    """One part ``[BR, D]`` of the last rows of a request, and which of them the ring keeps."""
    o_q = seq_len - S.ring + tl.arange(0, BR)
    m_q = (o_q >= start) & (o_q < seq_len)
    p_row = comp.kv_score + (token_end - seq_len + o_q) * token_stride
    o_d = part * S.dim + tl.arange(0, S.dim)
    return tl.load(p_row[:, None] + o_d[None, :], mask=m_q[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_survivors(b_rows, comp, part, slot, start, seq_len, S: tl.constexpr, BR: tl.constexpr):
    """Write what `load_survivors` read into the ring."""
    o_q = seq_len - S.ring + tl.arange(0, BR)
    m_q = (o_q >= start) & (o_q < seq_len)
    p_ring = comp.state + (slot * S.ring + o_q % S.ring) * (4 * S.dim)
    o_d = part * S.dim + tl.arange(0, S.dim)
    tl.store(p_ring[:, None] + o_d[None, :], b_rows, mask=m_q[:, None])


@triton.jit
def csa_request(
    step, comp, row, token_stride, page_stride, first_row, eps,
    S: tl.constexpr, REQUESTS_ONLY: tl.constexpr, CASTS: tl.constexpr, SCAN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Pool a request's blocks that read its ring, then write the ring."""
    M: tl.constexpr = S.ratio
    seq_len = tl.load(step.seq_lens + row)
    extend_len = tl.load(step.extend_lens + row)
    slot = tl.load(step.state_slots + row)
    first_token = first_token_of(step.extend_lens, row, SCAN)
    start = seq_len - extend_len
    token_end = first_token + extend_len
    if extend_len > 0:
        o_w = tl.arange(0, 4 * S.dim)
        if REQUESTS_ONLY:
            # Read before anything waits: in decode this is the only row there is.
            b_last = tl.load(comp.kv_score + (token_end - 1) * token_stride + o_w).to(tl.float32)
        closing = start // M * M + (M - 1)
        end = seq_len
        if not REQUESTS_ONLY:
            end = tl.minimum(seq_len, start + 2 * M - 1)
        for position in range(closing, end, M):
            token = first_token + position - start
            csa_block(
                step, comp, row, slot, position, token, start, token_stride, page_stride, first_row, eps, S,
                False, CASTS,
            )  # fmt: skip
        # Survivors may land on ring rows that this program's blocks, in any of its threads, have just read.
        tl.debug_barrier()
        if REQUESTS_ONLY:
            p_ring = comp.state + slot * (S.ring * 4 * S.dim)
            for q in range(tl.maximum(start, seq_len - S.ring), seq_len - 1):
                b_row = tl.load(comp.kv_score + (token_end - seq_len + q) * token_stride + o_w).to(tl.float32)
                tl.store(p_ring + q % S.ring * (4 * S.dim) + o_w, b_row)
            tl.store(p_ring + (seq_len - 1) % S.ring * (4 * S.dim) + o_w, b_last)
        else:
            b_rows = load_survivors(comp, 0, start, seq_len, token_end, token_stride, S, BR)
            for part in tl.static_range(1, 4):
                b_next = load_survivors(comp, part, start, seq_len, token_end, token_stride, S, BR)
                store_survivors(b_rows, comp, part - 1, slot, start, seq_len, S, BR)
                b_rows = b_next
            store_survivors(b_rows, comp, 3, slot, start, seq_len, S, BR)
        open_first = seq_len // M * M
        if (open_first + M) % S.page_tokens == 0:
            keep_boundary(step, comp, row, open_first, seq_len, token_end, start, token_stride, page_stride, S)


@triton.jit
def csa_tokens(
    step, comp, i_g, num_tokens, token_stride, page_stride, first_row, eps, S: tl.constexpr, CASTS: tl.constexpr
):  # fmt: skip
    """Pool the block that one of tokens ``i_g*m .. i_g*m+m-1`` closes, if all its rows are new. At most one is."""
    M: tl.constexpr = S.ratio
    o_t = i_g * M + tl.arange(0, M)
    m_t = o_t < num_tokens
    b_position = tl.load(step.positions + o_t, mask=m_t, other=-1)
    b_row = tl.load(step.token_rows + o_t, mask=m_t, other=-1)
    m_t = m_t & (b_position >= 0) & (b_position % M == M - 1) & (o_t >= 2 * M - 1)
    b_row_before = tl.load(step.token_rows + o_t - (2 * M - 1), mask=m_t, other=-1)
    m_t = m_t & (b_row_before == b_row)
    token = tl.max(tl.where(m_t, o_t, -1), axis=0)
    if token >= 0:
        position = tl.sum(tl.where(o_t == token, b_position, 0), axis=0)
        row = tl.sum(tl.where(o_t == token, b_row, 0), axis=0)
        start = position - (2 * M - 1)
        csa_block(
            step, comp, row, row * 0, position, token, start, token_stride, page_stride, first_row, eps, S, True, CASTS
        )


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "page_stride", "num_window_rows"])
def flush_csa_kernel(
    step, main, index, num_requests, num_tokens, page_stride, num_window_rows, main_stride, index_stride, main_eps,
    index_eps, MAIN: tl.constexpr, INDEX: tl.constexpr, REQUESTS_ONLY: tl.constexpr, CASTS: tl.constexpr,
    SCAN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Requests of the main compressor, requests of the indexer, then their tokens: those that wait longest go first."""
    PARTS: tl.constexpr = (MAIN is not None) + (INDEX is not None)
    i_p = tl.program_id(0).to(tl.int64)
    no_row = num_window_rows * 0
    if i_p < PARTS * num_requests:
        if MAIN is not None:
            if i_p < num_requests:
                csa_request(
                    step, main, i_p, main_stride, page_stride, num_window_rows, main_eps,
                    MAIN, REQUESTS_ONLY, CASTS, SCAN, BR,
                )  # fmt: skip
        if INDEX is not None:
            if i_p >= (PARTS - 1) * num_requests:
                csa_request(
                    step, index, i_p - (PARTS - 1) * num_requests, index_stride, page_stride, no_row, index_eps,
                    INDEX, REQUESTS_ONLY, CASTS, SCAN, BR,
                )  # fmt: skip
    elif not REQUESTS_ONLY:
        RATIO: tl.constexpr = MAIN.ratio if MAIN is not None else INDEX.ratio
        groups = tl.cdiv(num_tokens, RATIO)
        i_g = i_p - PARTS * num_requests
        if MAIN is not None:
            if i_g < groups:
                csa_tokens(
                    step, main, i_g, num_tokens, main_stride, page_stride, num_window_rows, main_eps, MAIN, CASTS
                )
        if INDEX is not None:
            if i_g >= (PARTS - 1) * groups:
                i_g = i_g - (PARTS - 1) * groups
                csa_tokens(step, index, i_g, num_tokens, index_stride, page_stride, no_row, index_eps, INDEX, CASTS)


@triton.jit
def hca_load(comp, token, offset, count, token_stride, S: tl.constexpr, U: tl.constexpr):
    """Rows and biases of up to ``U`` tokens, as one flat tuple; nothing is read from the ``count``-th on."""
    o_d = tl.arange(0, S.dim)
    rows = ()
    for j in tl.static_range(U):
        p_row = comp.kv_score + (token + j) * token_stride + o_d
        b_kv = tl.load(p_row, mask=j < count, other=0.0)
        b_gate = tl.load(p_row + S.dim, mask=j < count, other=0.0)
        b_bias = tl.load(comp.slot_bias + (offset + j) * S.dim + o_d, mask=j < count, other=0.0)
        rows = rows + (b_kv, b_gate, b_bias)
    return rows


@triton.jit
def hca_take(b_m, b_s, b_a, rows, j: tl.constexpr):
    """Take the ``j``-th token of `hca_load` into an accumulator."""
    b_kv = rows[3 * j].to(tl.float32)
    b_gate = rows[3 * j + 1].to(tl.float32) + rows[3 * j + 2]
    return hca_update(b_m, b_s, b_a, b_kv, b_gate)


@triton.jit
def hca_segment(
    step, comp, row, slot, position, token, count, seq_len, token_stride, page_stride, first_row, eps,
    S: tl.constexpr, U: tl.constexpr, CASTS: tl.constexpr,
):  # fmt: skip
    """Take ``count`` tokens of one block into its accumulator, keep it after each of the request's last tokens, and
    store the entry if the block closes.

    The accumulator after a block's last token is not kept: the next token starts from an empty one.
    """
    o_d = tl.arange(0, S.dim)
    offset = position % S.ratio
    p_slot = comp.state + slot * (S.ring * 3 * S.dim) + o_d
    p_state = p_slot + (position + S.ring - 1) % S.ring * (3 * S.dim)
    b_m = tl.load(p_state, mask=offset > 0, other=float("-inf"))
    b_s = tl.load(p_state + S.dim, mask=offset > 0, other=0.0)
    b_a = tl.load(p_state + 2 * S.dim, mask=offset > 0, other=0.0)
    closes = offset + count == S.ratio
    # Tokens before the first whose accumulator is kept.
    plain = tl.maximum(tl.minimum(seq_len - S.ring - position, count), 0)
    if closes & (plain >= count - 1):
        plain = count
    # Whole chunks, in order; the rows of the next chunk arrive meanwhile.
    chunks = plain // U
    rows = hca_load(comp, token, offset, chunks * U, token_stride, S, U)
    for c in range(chunks):
        done = (c + 1) * U
        ahead = hca_load(comp, token + done, offset + done, chunks * U - done, token_stride, S, U)
        for j in tl.static_range(U):
            b_m, b_s, b_a = hca_take(b_m, b_s, b_a, rows, j)
        rows = ahead
    REST: tl.constexpr = min(U, 8)
    for done in range(chunks * U, count, REST):
        last_rows = hca_load(comp, token + done, offset + done, count - done, token_stride, S, REST)
        for j in tl.static_range(REST):
            b_m_next, b_s_next, b_a_next = hca_take(b_m, b_s, b_a, last_rows, j)
            q = position + done + j
            is_token = done + j < count
            b_m = tl.where(is_token, b_m_next, b_m)
            b_s = tl.where(is_token, b_s_next, b_s)
            b_a = tl.where(is_token, b_a_next, b_a)
            is_kept = is_token & (q >= seq_len - S.ring) & (q % S.ratio < S.ratio - 1)
            p_kept = p_slot + q % S.ring * (3 * S.dim)
            tl.store(p_kept, b_m, mask=is_kept)
            tl.store(p_kept + S.dim, b_s, mask=is_kept)
            tl.store(p_kept + 2 * S.dim, b_a, mask=is_kept)
    if closes:
        b_raw = tl.div_rn(b_a, b_s)
        store_entry(b_raw, step, comp, row, position - offset, page_stride, first_row, eps, S, CASTS)


@triton.jit
def first_kept_block(start, seq_len, S: tl.constexpr):
    """First position of the first block whose accumulators the request's own program must write: none but its first
    block's, unless that continues an accumulator, which another program could overwrite before it is read.
    """
    first = seq_len
    if start % S.ratio > 0:
        if (S.ring > 1) | (seq_len % S.ratio > 0):
            first = tl.maximum(seq_len - S.ring, 0) // S.ratio * S.ratio
            first = tl.maximum(first, start // S.ratio * S.ratio + S.ratio)
    return first


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "page_stride", "num_window_rows"])
def flush_hca_kernel(
    step, comp, num_requests, num_tokens, page_stride, num_window_rows, token_stride, eps,
    S: tl.constexpr, U: tl.constexpr, REQUESTS_ONLY: tl.constexpr, CASTS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """One program per request, then one per ``m`` tokens for the blocks that begin among them."""
    M: tl.constexpr = S.ratio
    i_p = tl.program_id(0).to(tl.int64)
    if i_p < num_requests:
        row = i_p
        seq_len = tl.load(step.seq_lens + row)
        extend_len = tl.load(step.extend_lens + row)
        slot = tl.load(step.state_slots + row)
        first_token = first_token_of(step.extend_lens, row, SCAN)
        start = seq_len - extend_len
        position = start
        if extend_len == 0:
            position = seq_len
        while position < seq_len:
            count = tl.minimum(seq_len, position // M * M + M) - position
            hca_segment(
                step, comp, row, slot, position, first_token + position - start, count, seq_len, token_stride,
                page_stride, num_window_rows, eps, S, U, CASTS,
            )  # fmt: skip
            tl.debug_barrier()
            position += count
            if not REQUESTS_ONLY:
                position = tl.maximum(position, first_kept_block(start, seq_len, S))
    elif not REQUESTS_ONLY:
        o_t = (i_p - num_requests) * M + tl.arange(0, M)
        m_t = o_t < num_tokens
        b_position = tl.load(step.positions + o_t, mask=m_t, other=-1)
        b_row = tl.load(step.token_rows + o_t, mask=m_t, other=-1)
        m_t = m_t & (b_position >= 0) & (b_position % M == 0) & (o_t > 0)
        b_row_before = tl.load(step.token_rows + o_t - 1, mask=m_t, other=-1)
        m_t = m_t & (b_row_before == b_row)
        blocks = tl.sum(m_t.to(tl.int32), axis=0)
        token = i_p * 0 - 1
        for _ in range(blocks):
            token = tl.min(tl.where(m_t & (o_t > token), o_t, num_tokens), axis=0)
            position = tl.sum(tl.where(o_t == token, b_position, 0), axis=0)
            row = tl.sum(tl.where(o_t == token, b_row, 0), axis=0)
            seq_len = tl.load(step.seq_lens + row)
            start = seq_len - tl.load(step.extend_lens + row)
            slot = tl.load(step.state_slots + row)
            if position < first_kept_block(start, seq_len, S):
                hca_segment(
                    step, comp, row, slot, position, token, tl.minimum(seq_len - position, M), seq_len, token_stride,
                    page_stride, num_window_rows, eps, S, U, CASTS,
                )  # fmt: skip


def _step_pointers(step: StepTensors) -> StepPointers:
    for name in ("positions", "token_rows", "seq_lens", "extend_lens", "state_slots"):
        check_contiguous(name, getattr(step, name))
    if step.history_pages.stride() != step.window_pages.stride() or step.history_pages.stride(-1) != 1:
        raise ValueError(
            f"page tables: expected equal strides, the last 1, got {step.history_pages.stride()} and "
            f"{step.window_pages.stride()}"
        )
    return StepPointers(
        step.positions, step.token_rows, step.seq_lens, step.extend_lens, step.state_slots, step.history_pages,
        step.window_pages,
    )  # fmt: skip


def _compressor(
    step: StepTensors, kv_score: torch.Tensor, state: torch.Tensor, boundary: torch.Tensor, pool: torch.Tensor,
    pool_format: RowFormat, params: CompressorParams, ratio: int,
) -> tuple[CompressorPointers, CompressorShape]:  # fmt: skip
    check_rows("kv_score", kv_score)
    for name, tensor in (("state", state), ("boundary", boundary), ("pool", pool), ("cos_sin", params.cos_sin)):
        check_contiguous(name, tensor)
    dim = params.norm_weight.shape[0]
    pointers = CompressorPointers(
        kv_score, state, boundary, pool, params.slot_bias, params.norm_weight, params.cos_sin
    )
    shape = CompressorShape(
        dim=dim,
        rope_dim=params.cos_sin.shape[1],
        ratio=ratio,
        ring=state.shape[1],
        page_tokens=step.page_tokens,
        rotate=params.rotate,
        hadamard_scale=dim**-0.5,
        store=store_format(pool_format),
    )
    return pointers, shape


def _launch_csa(step: StepTensors, main: CsaFlush | None, index: CsaFlush | None) -> None:
    parts = [
        (part.params.eps, part.kv_score, *_compressor(
            step, part.kv_score, part.streams, part.boundary, part.pool, part.pool_format, part.params,
            part.boundary.shape[1],
        ))
        for part in (main, index) if part is not None
    ]  # fmt: skip
    (main_eps, main_rows, main_pointers, main_shape), (index_eps, index_rows, index_pointers, index_shape) = (
        parts[0],
        parts[-1],
    )
    num_tokens, num_requests = len(main_rows), len(step.seq_lens)
    if num_tokens == 0 or num_requests == 0:
        return
    requests_only = num_tokens <= num_requests
    groups = 0 if requests_only else triton.cdiv(num_tokens, main_shape.ratio)
    flush_csa_kernel[(len(parts) * (num_requests + groups),)](
        step=_step_pointers(step),
        main=main_pointers,
        index=index_pointers,
        num_requests=num_requests,
        num_tokens=num_tokens,
        page_stride=step.history_pages.stride(0),
        num_window_rows=step.num_window_rows,
        main_stride=main_rows.stride(0),
        index_stride=index_rows.stride(0),
        main_eps=main_eps,
        index_eps=index_eps,
        MAIN=None if main is None else main_shape,
        INDEX=None if index is None else index_shape,
        REQUESTS_ONLY=requests_only,
        CASTS=hardware_casts(main_rows.device),
        SCAN=_SCAN,
        BR=triton.next_power_of_2(main_shape.ring),
        num_warps=CSA_WARPS,
        **EXACT,
    )


CSA_WARPS = 2


def flush_csa(
    step: StepTensors,
    kv_score: torch.Tensor,
    streams: torch.Tensor,
    boundary: torch.Tensor,
    pool: torch.Tensor,
    pool_format: RowFormat,
    params: CompressorParams,
) -> None:
    """`naive_flush_csa` in one launch; arguments as there.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: pool, streams, boundary.
    """
    part = CsaFlush(kv_score, streams, boundary, pool, pool_format, params)
    _launch_csa(step, None if params.rotate else part, part if params.rotate else None)


def flush_csa_layer(step: StepTensors, main: CsaFlush, index: CsaFlush) -> None:
    """`naive_flush_csa` of a layer's main compressor and of its indexer, in one launch together.

    Args:
        step (StepTensors): the step.
        main (CsaFlush): the main compressor.
        index (CsaFlush): the indexer's compressor, ``params.rotate`` set.

    Raises:
        ValueError: the two inputs differ in length, or a tensor is laid out otherwise than expected; nothing was written.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: both pools, streams and boundary states.
    """
    if len(main.kv_score) != len(index.kv_score):
        raise ValueError(f"index kv_score: expected {len(main.kv_score)} tokens, got {len(index.kv_score)}")
    if main.params.rotate or not index.params.rotate:
        raise ValueError("rotate: expected False for main and True for index")
    _launch_csa(step, main, index)


def flush_hca(
    step: StepTensors,
    kv_score: torch.Tensor,
    accumulators: torch.Tensor,
    pool: torch.Tensor,
    pool_format: RowFormat,
    params: CompressorParams,
) -> None:
    """`naive_flush_hca` in one launch; arguments as there.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: pool, accumulators.
    """
    num_tokens, num_requests = len(kv_score), len(step.seq_lens)
    if num_tokens == 0 or num_requests == 0:
        return
    ratio = params.slot_bias.shape[0]
    pointers, shape = _compressor(step, kv_score, accumulators, accumulators, pool, pool_format, params, ratio)
    requests_only = num_tokens <= num_requests
    unroll, warps = hca_tuning(num_tokens, num_requests)
    flush_hca_kernel[(num_requests + (0 if requests_only else triton.cdiv(num_tokens, ratio)),)](
        step=_step_pointers(step),
        comp=pointers,
        num_requests=num_requests,
        num_tokens=num_tokens,
        page_stride=step.history_pages.stride(0),
        num_window_rows=step.num_window_rows,
        token_stride=kv_score.stride(0),
        eps=params.eps,
        S=shape,
        U=unroll,
        REQUESTS_ONLY=requests_only,
        CASTS=hardware_casts(kv_score.device),
        SCAN=_SCAN,
        num_warps=warps,
        **EXACT,
    )


def hca_tuning(num_tokens: int, num_requests: int) -> tuple[int, int]:
    """Tokens loaded ahead and warps per program: a decode step takes one token per request, a prefill whole blocks."""
    if num_tokens <= num_requests:
        return 1, 4
    return (4, 4) if num_tokens <= 8 * num_requests else (16, 16)
