"""Fused flush of an HCA layer, in one launch.

The program of a request owns the block that continues the request's accumulator and, if there is such a block, every
write of an accumulator: no other program could know that it has been read. Blocks that begin in the step have programs
of their own. In a prefill several programs share a block's channels, and the one that comes last finishes the row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.compressor.fused import (
    LOWEST_GATE,
    compressor_arguments,
    first_token_of,
    hca_finish,
    hca_update,
    store_entries,
)
from dsv4_kernels.compressor.params import CompressorParams
from dsv4_kernels.device import EXACT, hardware_casts, zero_like
from dsv4_kernels.flush_hca.tuning import HcaTuning, hca_tuning
from dsv4_kernels.layout import HEAD_DIM, RowFormat
from dsv4_kernels.memory import empty
from dsv4_kernels.step import StepTensors, step_pointers

_HCA_RATIO = 128


class HcaWorkspace(NamedTuple):
    """Scratch of `flush_hca`, from `hca_workspace`. One launch at a time may use it; it needs no clearing between them."""

    rows: torch.Tensor
    arrived: torch.Tensor


@triton.jit
def hca_load(comp, o_d, token, offset, count, S: tl.constexpr, U: tl.constexpr):
    """Rows and biases of up to ``U`` tokens, as one flat tuple; nothing is read from the ``count``-th on."""
    rows = ()
    for j in tl.static_range(U):
        p_row = comp.kv_score + (token.to(tl.int64) + j) * S.token_stride + o_d
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
    step,
    comp,
    work,
    i_d,
    row,
    slot,
    position,
    token,
    count,
    seq_len,
    work_row,
    page_stride,
    first_row,
    eps,
    S: tl.constexpr,
    U: tl.constexpr,
    SPLIT: tl.constexpr,
    CASTS: tl.constexpr,
):
    """Take ``count`` tokens of one block into its accumulator, keep it after each of the request's last tokens, and
    store the entry if the block closes. All this for one of ``SPLIT`` parts of the channels.

    The accumulator after a block's last token is not kept: the next token starts from an empty one.
    """
    o_d = i_d * (S.dim // SPLIT) + tl.arange(0, S.dim // SPLIT)  # [D / SPLIT]
    offset = position % S.ratio
    p_slot = comp.state + slot * (S.ring * 3 * S.dim) + o_d
    p_state = p_slot + (position + S.ring - 1) % S.ring * (3 * S.dim)
    b_m = tl.load(p_state, mask=offset > 0, other=LOWEST_GATE)
    b_s = tl.load(p_state + S.dim, mask=offset > 0, other=0.0)
    b_a = tl.load(p_state + 2 * S.dim, mask=offset > 0, other=0.0)
    closes = offset + count == S.ratio
    # Tokens before the first whose accumulator is kept.
    plain = tl.maximum(tl.minimum(seq_len - S.ring - position, count), 0)
    if closes & (plain >= count - 1):
        plain = count
    # Whole chunks in pairs, in order: while one is taken the rows of the other arrive. (One loop over single chunks would
    # move the arriving rows to other registers at its end, and so wait for them.)
    chunks = plain // U
    rows = hca_load(comp, o_d, token, offset, chunks * U, S, U)
    for pair in range(chunks // 2):
        done = (2 * pair + 1) * U
        other = hca_load(comp, o_d, token + done, offset + done, chunks * U - done, S, U)
        for j in tl.static_range(U):
            b_m, b_s, b_a = hca_take(b_m, b_s, b_a, rows, j)
        rows = hca_load(comp, o_d, token + done + U, offset + done + U, chunks * U - done - U, S, U)
        for j in tl.static_range(U):
            b_m, b_s, b_a = hca_take(b_m, b_s, b_a, other, j)
    if chunks % 2 > 0:
        for j in tl.static_range(U):
            b_m, b_s, b_a = hca_take(b_m, b_s, b_a, rows, j)
    REST: tl.constexpr = min(U, 8)
    for done in range(chunks * U, count, REST):
        last_rows = hca_load(comp, o_d, token + done, offset + done, count - done, S, REST)
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
        b_one = tl.zeros([1], tl.int32)
        b_row = b_one + row
        b_first = b_one + (position - offset)
        b_raw = hca_finish(b_m, b_s, b_a)
        if SPLIT == 1:
            store_entries((b_raw[None, :],), step, comp, b_row, b_first, b_one == 0, page_stride, first_row, eps, S, 1, CASTS)
        else:
            # The norm needs the whole row: whichever part comes last finishes it, and leaves the counter at 0.
            tl.store(work.rows + work_row * S.dim + o_d, b_raw)
            tl.debug_barrier()
            arrived = tl.atomic_add(work.arrived + work_row, 1, sem="acq_rel", scope="gpu")
            if arrived == SPLIT - 1:
                tl.store(work.arrived + work_row, 0)
                p_row = work.rows + work_row * S.dim + tl.arange(0, S.dim)
                b_whole = tl.load(p_row, cache_modifier=".cg")  # [D]
                store_entries(
                    (b_whole[None, :],), step, comp, b_row, b_first, b_one == 0, page_stride, first_row, eps, S, 1, CASTS
                )


@triton.jit
def first_kept_block(start, seq_len, S: tl.constexpr):
    """First position of the first block whose accumulators the request's own program must write: none but its first
    block's, unless that continues an accumulator, which another program could overwrite before it is read.
    """
    first = seq_len
    if (start % S.ratio > 0) & ((S.ring > 1) | (seq_len % S.ratio > 0)):
        first = tl.maximum(seq_len - S.ring, 0) // S.ratio * S.ratio
        first = tl.maximum(first, start // S.ratio * S.ratio + S.ratio)
    return first


@triton.jit
def of_token(o_t, b_x, token):
    """What ``b_x`` has for ``token``, one of ``o_t``."""
    return tl.sum(tl.where(o_t == token, b_x, 0), axis=0)


@triton.jit
def part_of_request(row, token, first_token, start, seq_len, num_requests, M: tl.constexpr):
    """A request program's part of the block at ``token``: first position, tokens, row of the workspace."""
    position = start + token - first_token
    count = tl.minimum(seq_len, position // M * M + M) - position
    work_row = row
    if position > start:
        work_row = num_requests + (token + count - 1).to(tl.int64) // M
    return position, count, work_row


@triton.jit
def block_of_tokens(o_t, b_position, token, kept, seq_len, num_requests, M: tl.constexpr):
    """A token program's block, which begins at ``token``, likewise; no token of what its request's program must keep."""
    position = of_token(o_t, b_position, token)
    count = tl.minimum(seq_len - position, M)
    work_row = num_requests + (token + count - 1).to(tl.int64) // M
    if position >= kept:
        count = 0
    return position, count, work_row


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "page_stride", "num_window_rows"])
def flush_hca_kernel(
    step,
    comp,
    work,
    num_requests,
    num_tokens,
    page_stride,
    num_window_rows,
    eps,
    S: tl.constexpr,
    U: tl.constexpr,
    SPLIT: tl.constexpr,
    REQUESTS_ONLY: tl.constexpr,
    CASTS: tl.constexpr,
):
    """One program per request, then one per ``m`` tokens for the blocks that begin among them; ``SPLIT`` of each.

    Both kinds go through their blocks in one loop, so that `hca_segment`, nearly all of the code, is there once.
    """
    M: tl.constexpr = S.ratio
    i_d = tl.program_id(0) % SPLIT
    i_p = tl.program_id(0) // SPLIT
    is_request = i_p < num_requests
    row = i_p.to(tl.int64)
    token = zero_like(num_tokens)
    first_token = token
    o_t = token + tl.arange(0, M)  # [M]
    m_t = o_t < 0
    b_position, b_row = o_t, o_t.to(tl.int64)
    if is_request:
        first_token = first_token_of(step, row, num_tokens)
        token = first_token
    elif not REQUESTS_ONLY:
        o_t = (i_p - num_requests) * M + tl.arange(0, M)  # [M]
        b_position = tl.load(step.positions + o_t, mask=o_t < num_tokens, other=-1).to(tl.int32)
        b_row = tl.load(step.token_rows + o_t, mask=o_t < num_tokens, other=-1)
        b_row_before = tl.load(step.token_rows + o_t - 1, mask=(o_t > 0) & (o_t < num_tokens), other=-2)
        # Blocks that begin here, but not with their request's first token: that one is its request's program's.
        m_t = (b_position >= 0) & (b_position % M == 0) & (b_row_before == b_row)
        token = tl.min(tl.where(m_t, o_t, num_tokens), axis=0)
        row = of_token(o_t, b_row, token)
    is_block = is_request | (token < num_tokens)
    while is_block:
        seq_len = tl.load(step.seq_lens + row).to(tl.int32)
        start = seq_len - tl.load(step.extend_lens + row).to(tl.int32)
        slot = tl.load(step.state_slots + row)
        kept = first_kept_block(start, seq_len, S)
        if is_request:
            position, count, work_row = part_of_request(row, token, first_token, start, seq_len, num_requests, M)
        else:
            position, count, work_row = block_of_tokens(o_t, b_position, token, kept, seq_len, num_requests, M)
        if count > 0:
            hca_segment(
                step,
                comp,
                work,
                i_d,
                row,
                slot,
                position,
                token,
                count,
                seq_len,
                work_row,
                page_stride,
                num_window_rows,
                eps,
                S,
                U,
                SPLIT,
                CASTS,
            )
            tl.debug_barrier()
        if REQUESTS_ONLY:
            token += count
            is_block = position + count < seq_len
        elif is_request:
            position = tl.maximum(position + count, kept)
            token = first_token + position - start
            is_block = position < seq_len
        else:
            token = tl.min(tl.where(m_t & (o_t > token), o_t, num_tokens), axis=0)
            is_block = token < num_tokens
            if is_block:
                row = of_token(o_t, b_row, token)


def hca_workspace(max_requests: int, max_tokens: int, device: torch.device) -> HcaWorkspace:
    """Allocate the scratch of `flush_hca` for steps of up to so many requests and tokens, of an HCA ratio of 128."""
    rows = max_requests + triton.cdiv(max_tokens, _HCA_RATIO)
    return HcaWorkspace(
        rows=empty((rows, HEAD_DIM), torch.float32, device), arrived=torch.zeros(rows, dtype=torch.int32, device=device)
    )


def flush_hca(
    step: StepTensors,
    kv_score: torch.Tensor,
    accumulators: torch.Tensor,
    pool: torch.Tensor,
    pool_format: RowFormat,
    params: CompressorParams,
    workspace: HcaWorkspace | None = None,
    tuning: HcaTuning | None = None,
) -> None:
    """`naive_flush_hca` in one launch; arguments as there.

    Args:
        workspace (HcaWorkspace | None): lets several programs share a block's channels, which a prefill of few blocks
            needs to fill a GPU; the bytes written are the same without.
        tuning (HcaTuning | None): by default what `hca_tuning` says.

    Raises:
        ValueError: the tuning splits blocks and there is no workspace, or one too small; or a tensor is laid out otherwise than
            expected; nothing was written.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: pool, accumulators, workspace.
    """
    num_tokens, num_requests = len(kv_score), len(step.seq_lens)
    if num_tokens == 0 or num_requests == 0:
        return
    ratio = params.slot_bias.shape[0]
    requests_only = num_tokens <= num_requests
    programs = num_requests + (0 if requests_only else triton.cdiv(num_tokens, ratio))
    if tuning is None:
        tuning = hca_tuning(num_tokens, num_requests, has_workspace=workspace is not None)
    if tuning.split == 1:
        workspace = None
    elif workspace is None:
        raise ValueError(f"tuning: expected split 1 without a workspace, got {tuning.split}")
    elif len(workspace.rows) < programs:
        raise ValueError(f"workspace: expected at least {programs} rows, got {len(workspace.rows)}")
    pointers, shape = compressor_arguments(step, kv_score, accumulators, None, pool, pool_format, params, ratio)
    flush_hca_kernel[(programs * tuning.split,)](
        step=step_pointers(step),
        comp=pointers,
        work=workspace,
        num_requests=num_requests,
        num_tokens=num_tokens,
        page_stride=step.history_pages.stride(0),
        num_window_rows=step.num_window_rows,
        eps=params.eps,
        S=shape,
        U=tuning.unroll,
        SPLIT=tuning.split,
        REQUESTS_ONLY=requests_only,
        CASTS=hardware_casts(kv_score.device),
        num_warps=tuning.warps,
        **EXACT,
    )
