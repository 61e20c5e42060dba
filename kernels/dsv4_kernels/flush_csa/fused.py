"""Fused flush of a CSA layer: one launch for its main compressor and its indexer.

A launch holds, for each compressor, one program per request and, unless the step is a decode step, one per ``m`` tokens.

A **token program** pools the block that one of its tokens closes, if all the block's rows are new; keeps the b-stream of
a page's last block; and keeps the stream rows of requests that start at a page boundary, whose ring nobody reads.
A **request program** pools the blocks that need rows of earlier steps (of the step's blocks, at most the first two), and
only then overwrites the ring rows they came from. In a decode step it does everything.
"""

import torch
import triton
import triton.language as tl

from dsv4_kernels.compressor.fused import (
    CompressorPointers,
    CompressorShape,
    compressor_arguments,
    csa_pool,
    first_token_of,
    store_entries,
)
from dsv4_kernels.compressor.params import CompressorParams
from dsv4_kernels.device import EXACT, hardware_casts, zero_like
from dsv4_kernels.flush_csa.naive import CsaFlush
from dsv4_kernels.flush_csa.stream_rows import keep_in_boundary, keep_in_ring, load_row, load_token
from dsv4_kernels.flush_csa.tuning import CsaTuning, csa_tuning
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.step import StepTensors, step_pointers


@triton.jit
def pool_old_and_new(
    step,
    comp,
    row,
    slot,
    position,
    token,
    start,
    page_stride,
    first_row,
    eps,
    S: tl.constexpr,
    C: tl.constexpr,
    CASTS: tl.constexpr,
):
    """Pool and store the block that ``position`` closes; its rows before ``start`` come from the state."""
    M: tl.constexpr = S.ratio
    D: tl.constexpr = S.dim
    first = position - (M - 1)
    has_previous = first > 0
    # The previous block's rows of earlier steps: at a page's start from the boundary state, else from the ring.
    at_page = has_previous & (first % S.page_tokens == 0)
    p_table = step.window_pages + row * page_stride + first // S.page_tokens - 1
    p_page = comp.boundary + tl.load(p_table, mask=at_page, other=0) * (M * 2 * D)
    p_ring = comp.state + slot * (S.ring * 4 * D)
    p_input = comp.kv_score + (token.to(tl.int64) - (2 * M - 1)) * S.token_stride
    chunks = ()
    for c in tl.static_range(D // C):
        o_d = c * C + tl.arange(0, C)
        kv, gate = (), ()
        for j in tl.static_range(2 * M):
            q = position - (2 * M - 1) + j
            is_new = q >= start
            p_new = p_input + j * S.token_stride
            p_old = p_ring + q % S.ring * (4 * D)
            if j < M:
                p_old_kv = tl.where(at_page, p_page + j * 2 * D, p_old)
                p_old_gate = tl.where(at_page, p_page + (j * 2 * D + D), p_old + 2 * D)
                b_kv = load_row(p_new, p_old_kv, is_new, has_previous, 0.0, o_d)
                b_gate = load_row(p_new + 2 * D, p_old_gate, is_new, has_previous, float("-inf"), o_d)
            else:
                b_kv = load_row(p_new + D, p_old + D, is_new, q >= 0, 0.0, o_d)
                b_gate = load_row(p_new + 3 * D, p_old + 3 * D, is_new, q >= 0, 0.0, o_d)
            kv = kv + (b_kv,)
            gate = gate + (b_gate + tl.load(comp.slot_bias + j * D + o_d),)
        chunks = chunks + (csa_pool(kv, gate)[None, :],)  # [1, C]
    b_one = tl.zeros([1], tl.int32)
    store_entries(chunks, step, comp, b_one + row, b_one + first, b_one == 0, page_stride, first_row, eps, S, 1, CASTS)


@triton.jit
def pool_new(
    step,
    comp,
    b_row,
    b_position,
    b_token,
    m_e,
    page_stride,
    first_row,
    eps,
    S: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    CASTS: tl.constexpr,
):
    """Pool and store ``E`` blocks all of whose rows are this step's; the loads of all are in flight together."""
    M: tl.constexpr = S.ratio
    D: tl.constexpr = S.dim
    m_previous = (m_e & (b_position >= M))[:, None]  # [E, 1]
    p_input = comp.kv_score + (b_token.to(tl.int64) - (2 * M - 1)) * S.token_stride
    chunks = ()
    for c in tl.static_range(D // C):
        o_d = c * C + tl.arange(0, C)
        kv, gate = (), ()
        for j in tl.static_range(2 * M):
            p_row = (p_input + j * S.token_stride)[:, None] + o_d[None, :]  # [E, C]
            if j < M:
                b_kv = tl.load(p_row, mask=m_previous, other=0.0)
                b_gate = tl.load(p_row + 2 * D, mask=m_previous, other=float("-inf"))
            else:
                b_kv = tl.load(p_row + D, mask=m_e[:, None], other=0.0)
                b_gate = tl.load(p_row + 3 * D, mask=m_e[:, None], other=0.0)
            b_bias = tl.load(comp.slot_bias + j * D + o_d)[None, :]
            kv = kv + (b_kv.to(tl.float32),)
            gate = gate + (b_gate.to(tl.float32) + b_bias,)
        chunks = chunks + (csa_pool(kv, gate),)  # [E, C]
    store_entries(chunks, step, comp, b_row, b_position - (M - 1), m_e, page_stride, first_row, eps, S, E, CASTS)


@triton.jit
def csa_request(
    step,
    comp,
    row,
    num_tokens,
    page_stride,
    first_row,
    eps,
    S: tl.constexpr,
    C: tl.constexpr,
    REQUESTS_ONLY: tl.constexpr,
    CASTS: tl.constexpr,
):
    """Pool a request's blocks that need rows of earlier steps, then overwrite the ring."""
    M: tl.constexpr = S.ratio
    if REQUESTS_ONLY:
        # Read before anything waits: where every request has one token, this row is the request's.
        b_kv, b_gate = load_token(comp, row, row < num_tokens, S)
    seq_len = tl.load(step.seq_lens + row).to(tl.int32)
    extend_len = tl.load(step.extend_lens + row).to(tl.int32)
    slot = tl.load(step.state_slots + row)
    start = seq_len - extend_len
    if (extend_len > 0) & (REQUESTS_ONLY | (start > 0)):
        first_token = first_token_of(step, row, num_tokens)
        last_token = first_token + extend_len - 1
        if REQUESTS_ONLY:  # noqa: SIM102
            if last_token != row:
                b_kv, b_gate = load_token(comp, last_token, last_token >= 0, S)
        end = seq_len
        if not REQUESTS_ONLY:
            end = tl.minimum(seq_len, start + 2 * M - 1)
        for i in range(start // M * M + (M - 1), end, M):
            position = zero_like(seq_len) + i
            pool_old_and_new(
                step, comp, row, slot, position, first_token + position - start, start, page_stride, first_row, eps, S, C, CASTS
            )
        # Survivors may land on ring rows that this program's blocks, in any of its threads, have just read.
        tl.debug_barrier()
        if REQUESTS_ONLY:
            for i in range(start, seq_len - 1):
                q = zero_like(seq_len) + i
                b_kv_before, b_gate_before = load_token(comp, first_token + q - start, q >= 0, S)
                if q >= seq_len - S.ring:
                    keep_in_ring(comp, slot, q, b_kv_before, b_gate_before, S)
                if q % S.page_tokens >= S.page_tokens - M:
                    keep_in_boundary(step, comp, row, q, b_kv_before, b_gate_before, page_stride, S)
            keep_in_ring(comp, slot, seq_len - 1, b_kv, b_gate, S)
            if (seq_len - 1) % S.page_tokens >= S.page_tokens - M:
                keep_in_boundary(step, comp, row, seq_len - 1, b_kv, b_gate, page_stride, S)
        elif start % S.page_tokens != 0:
            first_kept = tl.maximum(start, seq_len - S.ring)
            b_kv, b_gate = load_token(comp, first_token + first_kept - start, first_kept >= 0, S)
            for i in range(first_kept, seq_len):
                q = zero_like(seq_len) + i
                b_kv_next, b_gate_next = load_token(comp, first_token + q + 1 - start, q + 1 < seq_len, S)
                keep_in_ring(comp, slot, q, b_kv, b_gate, S)
                b_kv, b_gate = b_kv_next, b_gate_next


@triton.jit
def csa_tokens(
    step,
    comp,
    i_g,
    num_tokens,
    page_stride,
    first_row,
    eps,
    S: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    CASTS: tl.constexpr,
):
    """What ``E`` times ``m`` tokens close and keep. At most one of each ``m`` closes a block whose rows are all new."""
    M: tl.constexpr = S.ratio
    o_t = i_g * (E * M) + tl.arange(0, E)[:, None] * M + tl.arange(0, M)[None, :]  # [E, M]
    m_t = o_t < num_tokens
    b_position = tl.load(step.positions + o_t, mask=m_t, other=-1).to(tl.int32)
    b_row = tl.load(step.token_rows + o_t, mask=m_t, other=0)
    # A request's tokens lie together: if the oldest row of the block, or of the two, is this request's, all of them are.
    b_row_own = tl.load(step.token_rows + o_t - (M - 1), mask=m_t & (o_t >= M - 1), other=-1)
    b_row_both = tl.load(step.token_rows + o_t - (2 * M - 1), mask=m_t & (o_t >= 2 * M - 1), other=-1)
    m_t = b_position >= 0
    m_new = (b_row_both == b_row) | ((b_row_own == b_row) & (b_position == M - 1))
    m_new = m_new & (b_position % M == M - 1) & m_t
    b_seq_len = tl.load(step.seq_lens + b_row, mask=m_t, other=0).to(tl.int32)
    b_start = b_seq_len - tl.load(step.extend_lens + b_row, mask=m_t, other=0).to(tl.int32)
    b_ring = (m_t & (b_position >= b_seq_len - S.ring) & (b_start % S.page_tokens == 0)).to(tl.int32)
    b_last = (m_t & (b_position % S.page_tokens >= S.page_tokens - M)).to(tl.int32)
    b_token = tl.max(tl.where(m_new, o_t, -1), axis=1)  # [E]
    if tl.max(b_token, axis=0) >= 0:
        b_request = tl.max(tl.where(m_new, b_row, 0), axis=1)  # [E]
        b_closing = tl.max(tl.where(m_new, b_position, -1), axis=1)  # [E]
        pool_new(step, comp, b_request, b_closing, b_token, b_token >= 0, page_stride, first_row, eps, S, C, E, CASTS)
    if tl.max(tl.max(b_ring | b_last, axis=1), axis=0) > 0:
        for j in range(tl.minimum(num_tokens - i_g * (E * M), E * M)):
            token = i_g * (E * M) + j
            in_ring = tl.sum(tl.sum(tl.where(o_t == token, b_ring, 0), axis=1), axis=0) > 0
            is_last = tl.sum(tl.sum(tl.where(o_t == token, b_last, 0), axis=1), axis=0) > 0
            if in_ring | is_last:
                position = tl.load(step.positions + token).to(tl.int32)
                row = tl.load(step.token_rows + token)
                b_kv, b_gate = load_token(comp, token, position >= 0, S)
                if in_ring:
                    slot = tl.load(step.state_slots + row)
                    keep_in_ring(comp, slot, position, b_kv, b_gate, S)
                if is_last:
                    keep_in_boundary(step, comp, row, position, b_kv, b_gate, page_stride, S)


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "page_stride", "num_window_rows"])
def flush_csa_kernel(
    step,
    main,
    index,
    num_requests,
    num_tokens,
    page_stride,
    num_window_rows,
    main_eps,
    index_eps,
    MAIN: tl.constexpr,
    INDEX: tl.constexpr,
    C: tl.constexpr,
    MAIN_BLOCKS: tl.constexpr,
    INDEX_BLOCKS: tl.constexpr,
    REQUESTS_ONLY: tl.constexpr,
    CASTS: tl.constexpr,
):
    """Requests of the main compressor, requests of the indexer, then their tokens: those that wait longest go first."""
    PARTS: tl.constexpr = (MAIN is not None) + (INDEX is not None)
    i_p = tl.program_id(0)
    no_row = zero_like(num_window_rows)
    # The compiler decides the outer tests; joined with the inner ones by "and" they would be left to the GPU.
    if i_p < PARTS * num_requests:
        if MAIN is not None:  # noqa: SIM102
            if i_p < num_requests:
                csa_request(
                    step,
                    main,
                    i_p.to(tl.int64),
                    num_tokens,
                    page_stride,
                    num_window_rows,
                    main_eps,
                    MAIN,
                    min(C, MAIN.dim),
                    REQUESTS_ONLY,
                    CASTS,
                )
        if INDEX is not None:  # noqa: SIM102
            if i_p >= (PARTS - 1) * num_requests:
                csa_request(
                    step,
                    index,
                    (i_p - (PARTS - 1) * num_requests).to(tl.int64),
                    num_tokens,
                    page_stride,
                    no_row,
                    index_eps,
                    INDEX,
                    min(C, INDEX.dim),
                    REQUESTS_ONLY,
                    CASTS,
                )
    elif not REQUESTS_ONLY:
        i_g = i_p - PARTS * num_requests
        if MAIN is not None:
            groups = tl.cdiv(num_tokens, MAIN_BLOCKS * MAIN.ratio)
            if i_g < groups:
                csa_tokens(
                    step,
                    main,
                    i_g,
                    num_tokens,
                    page_stride,
                    num_window_rows,
                    main_eps,
                    MAIN,
                    min(C, MAIN.dim),
                    MAIN_BLOCKS,
                    CASTS,
                )
            i_g -= groups
        if INDEX is not None:  # noqa: SIM102
            if i_g >= 0:
                csa_tokens(
                    step, index, i_g, num_tokens, page_stride, no_row, index_eps, INDEX, min(C, INDEX.dim), INDEX_BLOCKS, CASTS
                )


def _launch_csa(step: StepTensors, main: CsaFlush | None, index: CsaFlush | None, tuning: CsaTuning | None) -> None:
    parts = [part for part in (main, index) if part is not None]
    num_tokens, num_requests = len(parts[0].kv_score), len(step.seq_lens)
    if num_tokens == 0 or num_requests == 0:
        return
    requests_only = num_tokens <= num_requests
    if tuning is None:
        tuning = csa_tuning(num_tokens, num_requests)
    main_pointers, main_shape, main_groups = _arguments(step, main, 0 if requests_only else tuning.main_blocks)
    index_pointers, index_shape, index_groups = _arguments(step, index, 0 if requests_only else tuning.index_blocks)
    flush_csa_kernel[(len(parts) * num_requests + main_groups + index_groups,)](
        step=step_pointers(step),
        main=main_pointers,
        index=index_pointers,
        num_requests=num_requests,
        num_tokens=num_tokens,
        page_stride=step.history_pages.stride(0),
        num_window_rows=step.num_window_rows,
        main_eps=parts[0].params.eps,
        index_eps=parts[-1].params.eps,
        MAIN=main_shape,
        INDEX=index_shape,
        C=tuning.chunk,
        MAIN_BLOCKS=tuning.main_blocks,
        INDEX_BLOCKS=tuning.index_blocks,
        REQUESTS_ONLY=requests_only,
        CASTS=hardware_casts(parts[0].kv_score.device),
        num_warps=tuning.warps,
        **tuning.options,
        **EXACT,
    )


def _arguments(
    step: StepTensors, part: CsaFlush | None, blocks: int
) -> tuple[CompressorPointers | None, CompressorShape | None, int]:
    """A compressor for the kernel, and how many programs of ``blocks`` blocks its tokens have; 0 blocks: none."""
    if part is None:
        return None, None, 0
    ratio = part.boundary.shape[1]
    pointers, shape = compressor_arguments(
        step, part.kv_score, part.streams, part.boundary, part.pool, part.pool_format, part.params, ratio
    )
    return pointers, shape, triton.cdiv(len(part.kv_score), blocks * ratio) if blocks else 0


def flush_csa(
    step: StepTensors,
    kv_score: torch.Tensor,
    streams: torch.Tensor,
    boundary: torch.Tensor,
    pool: torch.Tensor,
    pool_format: RowFormat,
    params: CompressorParams,
    tuning: CsaTuning | None = None,
) -> None:
    """`naive_flush_csa` in one launch; arguments as there.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: pool, streams, boundary.
    """
    part = CsaFlush(kv_score, streams, boundary, pool, pool_format, params)
    _launch_csa(step, None if params.rotate else part, part if params.rotate else None, tuning)


def flush_csa_layer(step: StepTensors, main: CsaFlush, index: CsaFlush, tuning: CsaTuning | None = None) -> None:
    """`naive_flush_csa` of a layer's main compressor and of its indexer, in one launch together.

    Args:
        step (StepTensors): the step.
        main (CsaFlush): the main compressor.
        index (CsaFlush): the indexer's compressor, ``params.rotate`` set.
        tuning (CsaTuning | None): by default what `csa_tuning` says.

    Raises:
        ValueError: the two inputs differ in length, or a tensor is laid out otherwise than expected; nothing was written.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: both pools, streams and boundary states.
    """
    if len(main.kv_score) != len(index.kv_score):
        raise ValueError(f"index kv_score: expected {len(main.kv_score)} tokens, got {len(index.kv_score)}")
    if main.params.rotate or not index.params.rotate:
        raise ValueError("rotate: expected False for main and True for index")
    _launch_csa(step, main, index, tuning)
