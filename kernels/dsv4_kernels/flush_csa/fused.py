"""Fused flush of a CSA layer: one launch for its main compressor and its indexer.

A launch holds, for each compressor, one program per request and one per few tokens. The **request's program** owns
everything that touches the request's stream rows: it pools the blocks that need rows of earlier steps (of the step's
blocks, at most the first two), and only then overwrites the ring. The **others** pool blocks whose ``2*m`` rows are all
new, and never read a stream. Both run the same code on rows from other addresses.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dsv4_kernels.compress.fused import csa_pool
from dsv4_kernels.device import EXACT, hardware_casts
from dsv4_kernels.flush.fused import (
    SCAN,
    compressor_arguments,
    first_token_of,
    step_pointers,
    store_entries,
)
from dsv4_kernels.flush.naive import CompressorParams
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.step import StepTensors


@dataclass(frozen=True)
class CsaFlush:
    """Arguments of `naive_flush_csa` for one compressor, without the step."""

    kv_score: torch.Tensor
    streams: torch.Tensor
    boundary: torch.Tensor
    pool: torch.Tensor
    pool_format: RowFormat
    params: CompressorParams


@triton.jit
def load_rows(p_new, p_old, m_new, m_e, absent, D: tl.constexpr):
    """Rows ``[E, D]`` of this step's input or of the state; ``absent`` where there is none."""
    o_d = tl.arange(0, D)[None, :]
    if p_new.dtype.element_ty == tl.float32:
        return tl.load(
            tl.where(m_new, p_new, p_old)[:, None] + o_d, mask=m_e[:, None], other=absent
        )
    b_old = tl.load(p_old[:, None] + o_d, mask=(m_e & (m_new == 0))[:, None], other=absent)
    b_new = tl.load(p_new[:, None] + o_d, mask=(m_e & m_new)[:, None], other=0.0).to(tl.float32)
    return tl.where(m_new[:, None], b_new, b_old)


@triton.jit
def csa_blocks(
    step, comp, b_row, b_slot, b_position, b_token, b_start, m_e, page_stride, first_row, eps,
    S: tl.constexpr, E: tl.constexpr, ALL_NEW: tl.constexpr, CASTS: tl.constexpr,
):  # fmt: skip
    """Pool and store ``E`` blocks, each closed by its ``b_position``; rows before ``b_start`` come from the state."""
    M: tl.constexpr = S.ratio
    D: tl.constexpr = S.dim
    o_d = tl.arange(0, D)
    b_first = b_position - (M - 1)
    m_previous = m_e & (b_first > 0)
    p_new = comp.kv_score + (b_token.to(tl.int64) - (2 * M - 1)) * S.token_stride
    if not ALL_NEW:
        # The previous block's rows of earlier steps: at a page's start from the boundary state, else from the ring.
        m_boundary = m_previous & (b_first % S.page_tokens == 0)
        p_table = step.window_pages + b_row * page_stride + b_first // S.page_tokens - 1
        p_page = comp.boundary + tl.load(p_table, mask=m_boundary, other=0) * (M * 2 * D)
        p_ring = comp.state + b_slot * (S.ring * 4 * D)
    kv, gate = (), ()
    for j in tl.static_range(2 * M):
        if ALL_NEW:
            p_row = (p_new + j * S.token_stride + j // M * D)[:, None] + o_d[None, :]
            b_gate = tl.load(p_row + 2 * D, mask=m_e[:, None], other=0.0).to(tl.float32)
            b_kv = tl.load(p_row, mask=m_e[:, None], other=0.0).to(tl.float32)
        else:
            b_q = b_position - (2 * M - 1) + j
            m_new = b_q >= b_start
            p_new_row = p_new + j * S.token_stride
            p_old_row = p_ring + b_q % S.ring * (4 * D)
            if j < M:
                p_kv = tl.where(m_boundary, p_page + j * 2 * D, p_old_row)
                p_gate = tl.where(m_boundary, p_page + j * 2 * D + D, p_old_row + 2 * D)
                b_gate = load_rows(p_new_row + 2 * D, p_gate, m_new, m_previous, float("-inf"), D)
                b_kv = load_rows(p_new_row, p_kv, m_new, m_previous, 0.0, D)
            else:
                b_gate = load_rows(p_new_row + 3 * D, p_old_row + 3 * D, m_new, m_e, 0.0, D)
                b_kv = load_rows(p_new_row + D, p_old_row + D, m_new, m_e, 0.0, D)
        gate = gate + (b_gate + tl.load(comp.slot_bias + j * D + o_d)[None, :],)
        kv = kv + (b_kv,)
    store_entries(
        csa_pool(kv, gate),
        step,
        comp,
        b_row,
        b_first,
        m_e,
        page_stride,
        first_row,
        eps,
        S,
        E,
        CASTS,
    )
    m_last = m_e & ((b_position + 1) % S.page_tokens == 0)
    if tl.max(m_last.to(tl.int32), axis=0) > 0:
        keep_boundary(
            step,
            comp,
            b_row,
            b_first,
            b_position + 1,
            b_token - (M - 1),
            b_start,
            m_last,
            page_stride,
            S,
        )


@triton.jit
def keep_boundary(
    step, comp, b_row, b_first, b_end, b_token, b_start, m_e, page_stride, S: tl.constexpr
):
    """Copy the b-stream of the new positions of blocks that end a page to the boundary state.

    A block's positions are ``b_first .. b_end-1``, and ``b_token`` is the token of ``b_first``, or would be.
    """
    M: tl.constexpr = S.ratio
    o_d = tl.arange(0, S.dim)[None, :]
    p_table = step.window_pages + b_row * page_stride + b_first // S.page_tokens
    p_page = comp.boundary + tl.load(p_table, mask=m_e, other=0) * (S.ratio * 2 * S.dim)
    for j in tl.static_range(M):
        m_j = (m_e & (b_first + j >= b_start) & (b_first + j < b_end))[:, None]
        p_row = (comp.kv_score + (b_token.to(tl.int64) + j) * S.token_stride)[:, None] + o_d
        p_kept = (p_page + j * 2 * S.dim)[:, None] + o_d
        tl.store(p_kept, tl.load(p_row, mask=m_j, other=0.0).to(tl.float32), mask=m_j)
        tl.store(
            p_kept + S.dim, tl.load(p_row + 2 * S.dim, mask=m_j, other=0.0).to(tl.float32), mask=m_j
        )


@triton.jit
def load_survivors(comp, part, start, seq_len, token_end, S: tl.constexpr, BR: tl.constexpr):
    """One part ``[BR, D]`` of the last rows of a request, and which of them the ring keeps."""
    o_q = seq_len - S.ring + tl.arange(0, BR)
    m_q = (o_q >= start) & (o_q < seq_len)
    p_row = comp.kv_score + (token_end - seq_len + o_q).to(tl.int64) * S.token_stride
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
    step, comp, row, num_tokens, page_stride, first_row, eps,
    S: tl.constexpr, REQUESTS_ONLY: tl.constexpr, CASTS: tl.constexpr, SCAN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Pool a request's blocks that read its ring, then write the ring."""
    M: tl.constexpr = S.ratio
    seq_len = tl.load(step.seq_lens + row).to(tl.int32)
    extend_len = tl.load(step.extend_lens + row).to(tl.int32)
    slot = tl.load(step.state_slots + row)
    first_token = first_token_of(step, row, num_tokens, SCAN)
    start = seq_len - extend_len
    token_end = first_token + extend_len
    if extend_len > 0:
        o_w = tl.arange(0, 4 * S.dim)
        if REQUESTS_ONLY:
            # Read before anything waits: in decode this is the only row there is.
            b_last = tl.load(
                comp.kv_score + (token_end - 1).to(tl.int64) * S.token_stride + o_w
            ).to(tl.float32)
        b_one = tl.zeros([1], tl.int32)
        closing = start // M * M + (M - 1)
        end = seq_len
        if not REQUESTS_ONLY:
            end = tl.minimum(seq_len, start + 2 * M - 1)
        for position in range(closing, end, M):
            csa_blocks(
                step, comp, b_one + row, b_one + slot, b_one + position, b_one + (first_token + position - start),
                b_one + start, b_one == 0, page_stride, first_row, eps, S, 1, False, CASTS,
            )  # fmt: skip
        # Survivors may land on ring rows that this program's blocks, in any of its threads, have just read.
        tl.debug_barrier()
        if REQUESTS_ONLY:
            p_ring = comp.state + slot * (S.ring * 4 * S.dim)
            for q in range(tl.maximum(start, seq_len - S.ring), seq_len - 1):
                b_row = tl.load(
                    comp.kv_score + (token_end - seq_len + q).to(tl.int64) * S.token_stride + o_w
                ).to(tl.float32)
                tl.store(p_ring + q % S.ring * (4 * S.dim) + o_w, b_row)
            tl.store(p_ring + (seq_len - 1) % S.ring * (4 * S.dim) + o_w, b_last)
        else:
            b_rows = load_survivors(comp, 0, start, seq_len, token_end, S, BR)
            for part in tl.static_range(1, 4):
                b_next = load_survivors(comp, part, start, seq_len, token_end, S, BR)
                store_survivors(b_rows, comp, part - 1, slot, start, seq_len, S, BR)
                b_rows = b_next
            store_survivors(b_rows, comp, 3, slot, start, seq_len, S, BR)
        open_first = seq_len // M * M
        if (open_first + M) % S.page_tokens == 0:
            keep_boundary(
                step, comp, b_one + row, b_one + open_first, b_one + seq_len, b_one + (first_token + open_first - start),
                b_one + start, b_one == 0, page_stride, S,
            )  # fmt: skip


@triton.jit
def csa_tokens(
    step, comp, i_g, num_tokens, page_stride, first_row, eps, S: tl.constexpr, E: tl.constexpr, CASTS: tl.constexpr
):  # fmt: skip
    """Pool the blocks that tokens ``i_g*E*m ..`` close and whose rows are all new: at most one in each ``m`` tokens."""
    M: tl.constexpr = S.ratio
    o_t = (
        (i_g * (E * M)).to(tl.int32) + tl.arange(0, E)[:, None] * M + tl.arange(0, M)[None, :]
    )  # [E, M]
    m_t = o_t < num_tokens
    b_position = tl.load(step.positions + o_t, mask=m_t, other=-1).to(tl.int32)
    b_row = tl.load(step.token_rows + o_t, mask=m_t, other=-1)
    # One request's tokens lie together: if the first of the two blocks' rows is this request's, all are, and are new.
    b_row_before = tl.load(
        step.token_rows + o_t - (2 * M - 1), mask=m_t & (o_t >= 2 * M - 1), other=-2
    )
    m_t = (b_position >= 0) & (b_position % M == M - 1) & (b_row_before == b_row)
    b_token = tl.max(tl.where(m_t, o_t, -1), axis=1)
    m_e = b_token >= 0
    if tl.max(b_token, axis=0) >= 0:
        b_closing = tl.sum(tl.where(m_t, b_position, 0), axis=1)
        b_request = tl.sum(tl.where(m_t, b_row, 0), axis=1)
        csa_blocks(
            step, comp, b_request, b_request, b_closing, b_token, b_closing * 0, m_e, page_stride, first_row, eps,
            S, E, True, CASTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "page_stride", "num_window_rows"])
def flush_csa_kernel(
    step, main, index, num_requests, num_tokens, page_stride, num_window_rows, main_eps,
    index_eps, MAIN: tl.constexpr, INDEX: tl.constexpr, REQUESTS_ONLY: tl.constexpr, CASTS: tl.constexpr,
    SCAN: tl.constexpr, BR: tl.constexpr, MAIN_ROWS: tl.constexpr, INDEX_ROWS: tl.constexpr,
):  # fmt: skip
    """Requests of the main compressor, requests of the indexer, then their tokens: those that wait longest go first."""
    PARTS: tl.constexpr = (MAIN is not None) + (INDEX is not None)
    i_p = tl.program_id(0).to(tl.int64)
    no_row = num_window_rows * 0
    # The compiler decides the outer tests; joined with the inner ones by "and" they would be left to the GPU.
    if i_p < PARTS * num_requests:
        if MAIN is not None:  # noqa: SIM102
            if i_p < num_requests:
                csa_request(
                    step, main, i_p, num_tokens, page_stride, num_window_rows, main_eps,
                    MAIN, REQUESTS_ONLY, CASTS, SCAN, BR,
                )  # fmt: skip
        if INDEX is not None:  # noqa: SIM102
            if i_p >= (PARTS - 1) * num_requests:
                csa_request(
                    step, index, i_p - (PARTS - 1) * num_requests, num_tokens, page_stride, no_row, index_eps,
                    INDEX, REQUESTS_ONLY, CASTS, SCAN, BR,
                )  # fmt: skip
    elif not REQUESTS_ONLY:
        i_g = i_p - PARTS * num_requests
        if MAIN is not None:
            groups = tl.cdiv(num_tokens, MAIN_ROWS * MAIN.ratio)
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
                    MAIN_ROWS,
                    CASTS,
                )
            i_g -= groups
        if INDEX is not None:  # noqa: SIM102
            if i_g >= 0:
                csa_tokens(
                    step,
                    index,
                    i_g,
                    num_tokens,
                    page_stride,
                    no_row,
                    index_eps,
                    INDEX,
                    INDEX_ROWS,
                    CASTS,
                )


def _launch_csa(step: StepTensors, main: CsaFlush | None, index: CsaFlush | None) -> None:
    parts = [
        (part.params.eps, part.kv_score, *compressor_arguments(
            step, part.kv_score, part.streams, part.boundary, part.pool, part.pool_format, part.params,
            part.boundary.shape[1],
        ))
        for part in (main, index) if part is not None
    ]  # fmt: skip
    (
        (main_eps, main_rows, main_pointers, main_shape),
        (index_eps, _, index_pointers, index_shape),
    ) = (
        parts[0],
        parts[-1],
    )
    num_tokens, num_requests = len(main_rows), len(step.seq_lens)
    if num_tokens == 0 or num_requests == 0:
        return
    requests_only = num_tokens <= num_requests
    warps, main_rows_each, index_rows_each, options = csa_tuning(num_tokens, num_requests)
    groups = 0
    for part, rows in ((main, main_rows_each), (index, index_rows_each)):
        if part is not None and not requests_only:
            groups += triton.cdiv(num_tokens, rows * main_shape.ratio)
    flush_csa_kernel[(len(parts) * num_requests + groups,)](
        step=step_pointers(step),
        main=main_pointers,
        index=index_pointers,
        num_requests=num_requests,
        num_tokens=num_tokens,
        page_stride=step.history_pages.stride(0),
        num_window_rows=step.num_window_rows,
        main_eps=main_eps,
        index_eps=index_eps,
        MAIN=None if main is None else main_shape,
        INDEX=None if index is None else index_shape,
        REQUESTS_ONLY=requests_only,
        CASTS=hardware_casts(main_rows.device),
        SCAN=SCAN,
        BR=triton.next_power_of_2(main_shape.ring),
        MAIN_ROWS=main_rows_each,
        INDEX_ROWS=index_rows_each,
        num_warps=warps,
        **options,
        **EXACT,
    )


def csa_tuning(num_tokens: int, num_requests: int) -> tuple[int, int, int, dict[str, int]]:
    """Warps per program, the main entries and index keys that one program pools together, and compiler options.

    A decode step waits for one block's latency. A prefill needs many loads in flight, so several programs on every
    multiprocessor: the register limit is spent by code that few of its programs run.
    """
    return (4, 1, 4, {}) if num_tokens <= 8 * num_requests else (8, 1, 4, {"maxnreg": 64})


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
        raise ValueError(
            f"index kv_score: expected {len(main.kv_score)} tokens, got {len(index.kv_score)}"
        )
    if main.params.rotate or not index.params.rotate:
        raise ValueError("rotate: expected False for main and True for index")
    _launch_csa(step, main, index)
