"""Exact top-k of every token's scores, ties to the lowest entry, in at most two launches.

A program holds up to ``BLOCK`` scores in registers and reads them once. It finds the k-th largest bit by bit, and stops as
soon as exactly k scores reach the value found so far: after about 16 of 32 bits for distinct scores. One prefix sum then
gives each chosen entry its place, so the result is in the entries' order and needs no sort.

A row of more than ``BLOCK`` entries goes through two launches: the best k of every ``BLOCK`` entries, which hold the best
k of all, then the best k of those. Both break ties by the lowest entry, since candidates keep the entries' order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import check_contiguous, check_rows
from dsv4_kernels.memory import empty
from dsv4_kernels.step import StepTensors

# Scores one program can hold: 32 per thread with 16 warps.
BLOCK = 16384
# Programs that share the chunks of all rows, at least; a row's chunks are never more programs than there are.
_CHUNK_PROGRAMS = 512


class TopkWorkspace(NamedTuple):
    """Scratch of `topk_entries`, from `topk_workspace`: the best of every chunk. Empty where all rows fit one program."""

    scores: torch.Tensor
    entries: torch.Tensor


@triton.jit
def visible_entries(p_positions, token, RATIO: tl.constexpr):
    """Entries that a token sees; none for padding, whose position is -1."""
    return ((tl.load(p_positions + token) + 1) // RATIO).to(tl.int32)


@triton.jit
def choose(p_scores, count, K: tl.constexpr, SIZE: tl.constexpr):
    """The ``K`` best of ``count`` scores, or all of them: which, and their places in order."""
    o_s = tl.arange(0, SIZE)
    m_s = o_s < count
    b_score = tl.load(p_scores + o_s, mask=m_s, other=0.0)
    # Unsigned integers in the scores' order; both zeros are one score. 0 is below every number.
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.uint32, bitcast=True)
    b_key = tl.where((b_bits >> 31) > 0, b_bits ^ 0xFFFFFFFF, b_bits | 0x80000000)
    b_key = tl.where(m_s, b_key, 0)
    value = (count * 0).to(tl.uint32)
    bit = value + 0x80000000
    reached = count
    while (bit > 0) & (reached > K):
        trial = value | bit
        above = tl.sum((b_key >= trial).to(tl.int32), axis=0)
        if above >= K:
            value = trial
            reached = above
        bit = bit >> 1
    b_above = (b_key > value) & m_s
    b_equal = (b_key == value) & m_s
    b_packed = (b_above.to(tl.int32) << 16) + b_equal.to(tl.int32)
    b_before = tl.cumsum(b_packed, axis=0) - b_packed
    need = K - tl.sum(b_above.to(tl.int32), axis=0)
    b_equal_before = b_before & 0xFFFF
    m_chosen = b_above | (b_equal & (b_equal_before < need))
    return m_chosen, (b_before >> 16) + tl.minimum(b_equal_before, need)


@triton.jit(do_not_specialize=["first_token"])
def topk_chunks_kernel(
    p_positions, first_token, p_scores, score_stride, p_chunk_scores, p_chunk_entries, candidate_stride,
    RATIO: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The best of each chunk of a row too long for one program; ``SPLITS`` programs share a row's chunks."""
    i_t = (tl.program_id(0) // SPLITS).to(tl.int64)
    visible = visible_entries(p_positions, first_token + i_t, RATIO)
    if visible > SIZE:
        for chunk in range(tl.program_id(0) % SPLITS, tl.cdiv(visible, SIZE), SPLITS):
            p_row = p_scores + i_t * score_stride + chunk * SIZE
            m_chosen, b_place = choose(p_row, tl.minimum(visible - chunk * SIZE, SIZE), K, SIZE)
            o_s = tl.arange(0, SIZE)
            o_c = i_t * candidate_stride + chunk * K + b_place
            tl.store(p_chunk_scores + o_c, tl.load(p_row + o_s, mask=m_chosen), mask=m_chosen)
            tl.store(p_chunk_entries + o_c, chunk * SIZE + o_s, mask=m_chosen)


@triton.jit
def store_best(
    p_scores, p_entries, count, p_pages, p_out, first_row,
    INDIRECT: tl.constexpr, PER_PAGE: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Choose among ``count`` scores and store the rows of the chosen entries."""
    m_chosen, b_place = choose(p_scores, count, K, SIZE)
    b_entry = tl.arange(0, SIZE)
    if INDIRECT:
        b_entry = tl.load(p_entries + b_entry, mask=m_chosen, other=0)
    b_page = tl.load(p_pages + b_entry // PER_PAGE, mask=m_chosen, other=0)
    b_slot = first_row + b_page * PER_PAGE + b_entry % PER_PAGE
    tl.store(p_out + b_place, b_slot.to(p_out.dtype.element_ty), mask=m_chosen)


@triton.jit(do_not_specialize=["first_token", "page_stride", "num_window_rows"])
def topk_entries_kernel(
    p_positions, p_token_rows, p_pages, page_stride, first_token, p_scores, score_stride, p_chunk_scores,
    p_chunk_entries, candidate_stride, p_out, out_stride, num_window_rows, RATIO: tl.constexpr, PER_PAGE: tl.constexpr,
    K: tl.constexpr, K_BLOCK: tl.constexpr, SMALL: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    """One token per program: all it sees if that is at most ``K`` entries, or the best of its scores."""
    i_t = tl.program_id(0).to(tl.int64)
    token = first_token + i_t
    visible = visible_entries(p_positions, token, RATIO)
    p_out += token * out_stride
    p_table = p_pages + tl.load(p_token_rows + token) * page_stride
    p_row = p_scores + i_t * score_stride
    if visible <= K:
        o_k = tl.arange(0, K_BLOCK)
        b_page = tl.load(p_table + o_k // PER_PAGE, mask=o_k < visible, other=0)
        b_slot = num_window_rows + b_page * PER_PAGE + o_k % PER_PAGE
        b_slot = tl.where(o_k < visible, b_slot, -1).to(p_out.dtype.element_ty)
        tl.store(p_out + o_k, b_slot, mask=o_k < (K if PAD else visible))
    elif visible <= SMALL:
        store_best(
            p_row,
            p_chunk_entries,
            visible,
            p_table,
            p_out,
            num_window_rows,
            False,
            PER_PAGE,
            K,
            SMALL,
        )
    elif visible <= SIZE:
        store_best(
            p_row,
            p_chunk_entries,
            visible,
            p_table,
            p_out,
            num_window_rows,
            False,
            PER_PAGE,
            K,
            SIZE,
        )
    elif CHUNKED:
        # Every chunk but the last is full.
        full = tl.cdiv(visible, SIZE) - 1
        count = full * K + tl.minimum(visible - full * SIZE, K)
        o_c = i_t * candidate_stride
        store_best(
            p_chunk_scores + o_c, p_chunk_entries + o_c, count, p_table, p_out, num_window_rows, True, PER_PAGE, K,
            SIZE,
        )  # fmt: skip


def topk_workspace(
    max_scores: int, k: int, device: torch.device, block: int = BLOCK
) -> TopkWorkspace:
    """Allocate the scratch of `topk_entries` for up to so many scores of all its tokens."""
    # A row of more than ``block`` entries has less than twice as many chunks as blocks fit into it.
    size = triton.cdiv(2 * max_scores, block) * k if max_scores > block else 0
    return TopkWorkspace(empty((size,), torch.float32, device), empty((size,), torch.int32, device))


def topk_tuning(max_entries: int, k: int, block: int = BLOCK) -> tuple[int, int, int]:
    """Scores of a program, scores of a program whose row is short, and warps."""
    size = min(block, triton.next_power_of_2(max(max_entries, 16)))
    small = max(size // 4, triton.next_power_of_2(k))
    return size, min(small, size), max(4, min(16, size // 1024))


def topk_entries(
    step: StepTensors,
    scores: torch.Tensor,
    first_token: int,
    ratio: int,
    out: torch.Tensor,
    workspace: TopkWorkspace,
    block: int = BLOCK,
    pad: bool = True,
) -> None:
    """`naive_topk_entries` for some tokens of a step, in one launch or two, written as rows of the row pool.

    Args:
        step (StepTensors): the step; a token of position -1 is padding.
        scores (torch.Tensor): ``[N, S]`` fp32, of tokens ``first_token ..``. Nothing is read of tokens that see at most k
            entries, nor past the visible ones of any token.
        first_token (int): the first of these tokens.
        ratio (int): tokens per entry.
        out (torch.Tensor): ``[T, k]`` int32. Rows ``first_token .. first_token+N-1`` are written: rows of the row pool in
            the entries' order, then -1.
        workspace (TopkWorkspace): of `topk_workspace`.
        block (int): scores that one program takes, a power of two, as in `topk_workspace`.
        pad (bool): write -1 behind the chosen entries of a token that sees fewer than k; else these cells are left alone.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: out, workspace.
    """
    num_tokens, max_entries = scores.shape
    check_rows("scores", scores)
    check_rows("out", out)
    check_rows("history_pages", step.history_pages)
    for name in ("positions", "token_rows"):
        check_contiguous(name, getattr(step, name))
    k = out.shape[1]
    size, small, warps = topk_tuning(max_entries, k, block)
    chunks = triton.cdiv(max_entries, size)
    if max_entries > block // k * block:
        raise ValueError(
            f"scores: expected at most {block // k * block} entries for k = {k}, got {max_entries}"
        )
    candidates = num_tokens * chunks * k if chunks > 1 else 0
    if len(workspace.scores) < candidates:
        raise ValueError(
            f"workspace: expected at least {candidates} candidates, got {len(workspace.scores)}"
        )
    if num_tokens == 0:
        return
    common = {
        "p_positions": step.positions,
        "first_token": first_token,
        "p_scores": scores,
        "score_stride": scores.stride(0),
        "p_chunk_scores": workspace.scores,
        "p_chunk_entries": workspace.entries,
        "candidate_stride": chunks * k,
        "RATIO": ratio,
        "K": k,
        "SIZE": size,
        "num_warps": warps,
    }
    if chunks > 1:
        splits = min(chunks, triton.cdiv(_CHUNK_PROGRAMS, num_tokens))
        topk_chunks_kernel[(num_tokens * splits,)](SPLITS=splits, **common)
    topk_entries_kernel[(num_tokens,)](
        p_token_rows=step.token_rows,
        p_pages=step.history_pages,
        page_stride=step.history_pages.stride(0),
        p_out=out,
        out_stride=out.stride(0),
        num_window_rows=step.num_window_rows,
        PER_PAGE=step.page_tokens // ratio,
        K_BLOCK=triton.next_power_of_2(k),
        SMALL=small,
        CHUNKED=chunks > 1,
        PAD=pad,
        **common,
    )
