"""Exact top-k of every token's scores, ties to the lowest entry, in one launch.

A program has one token and ranks up to ``8 k`` numbers at a time. A row of more entries is a tournament: of its groups of
eight entries, ranked by their best scores, the best k hold the best k entries; and where there are more than ``8 k`` groups,
so do the best k of their groups of eight. At each level ties go to the lowest group: k groups that come before another hold k
entries that come before any of its own.

To rank, the k-th largest is found bit by bit, from the first bit in which largest and smallest differ; the search stops as
soon as exactly k numbers reach the value found so far. One prefix sum then gives each chosen one its place, so the result is
in the entries' order and needs no sort.
"""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import check_contiguous, check_rows, zero_like
from dsv4_kernels.index_topk.tuning import GROUP, WARPS, topk_levels, topk_registers
from dsv4_kernels.step import StepTensors


@triton.jit
def visible_entries(p_positions, token, RATIO: tl.constexpr):
    """Entries that a token sees; none for padding, whose position is -1."""
    return ((tl.load(p_positions + token) + 1) // RATIO).to(tl.int32)


@triton.jit
def order_key(b_score, m_s):
    """Unsigned integers in the scores' order; both zeros are one score. 0, below every number, where there is none."""
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.uint32, bitcast=True)
    b_key = tl.where((b_bits >> 31) > 0, b_bits ^ 0xFFFFFFFF, b_bits | 0x80000000)
    return tl.where(m_s, b_key, 0)


@triton.jit
def choose(b_key, m_s, K: tl.constexpr):
    """The ``K`` best of more than ``K`` keys: which, and their places in order."""
    high = tl.max(b_key, axis=0)
    low = tl.min(tl.where(m_s, b_key, 0xFFFFFFFF), axis=0)
    # Bits above the first in which the two differ are every key's.
    below = high ^ low
    for i in tl.static_range(5):
        below = below | (below >> (1 << i))
    bit = below ^ (below >> 1)
    value = high & (below ^ 0xFFFFFFFF)
    reached = zero_like(high).to(tl.int32) + (K + 1)
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
    b_before = tl.cumsum(b_packed, axis=0) - b_packed  # [SIZE]
    need = K - tl.sum(b_above.to(tl.int32), axis=0)
    b_equal_before = b_before & 0xFFFF
    m_chosen = b_above | (b_equal & (b_equal_before < need))
    return m_chosen, (b_before >> 16) + tl.minimum(b_equal_before, need)


@triton.jit
def largest_maxima(p_maxima, count, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """The maximum of each ``GROUP`` of ``count`` maxima, ``[SIZE]``."""
    o_g = tl.arange(0, SIZE) * GROUP
    b_max = tl.full([SIZE], float("-inf"), tl.float32)
    for i in tl.static_range(GROUP):
        b_max = tl.maximum(b_max, tl.load(p_maxima + o_g + i, mask=o_g + i < count, other=float("-inf")))
    return b_max


@triton.jit
def store_groups(p_groups, b_group, m_chosen, b_place):
    """Pass the chosen groups on to all threads, when these have read those of the level before."""
    tl.debug_barrier()
    tl.store(p_groups + b_place, b_group, mask=m_chosen)
    tl.debug_barrier()


@triton.jit
def choose_groups(p_maxima, p_groups, num_groups, K: tl.constexpr, SIZE: tl.constexpr):
    """Choose among at most ``SIZE`` groups by their maxima."""
    o_g = tl.arange(0, SIZE)
    m_g = o_g < num_groups
    b_best = tl.load(p_maxima + o_g, mask=m_g, other=0.0)  # [SIZE]
    m_chosen, b_place = choose(order_key(b_best, m_g), m_g, K)
    store_groups(p_groups, o_g, m_chosen, b_place)


@triton.jit
def members(p_groups, K: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """What the chosen groups consist of, in order, ``[SIZE]``; numbers beyond any row behind the last."""
    o_c = tl.arange(0, SIZE)
    b_group = tl.load(p_groups + o_c // GROUP, mask=o_c < K * GROUP, other=1 << 27)
    return b_group * GROUP + o_c % GROUP


@triton.jit
def store_rows(p_pages, p_out, b_entry, m_chosen, b_place, num_window_rows, PER_PAGE: tl.constexpr):
    """Store the pool's rows of the chosen entries."""
    b_page = tl.load(p_pages + b_entry // PER_PAGE, mask=m_chosen, other=0)
    b_slot = num_window_rows + b_page * PER_PAGE + b_entry % PER_PAGE
    tl.store(p_out + b_place, b_slot.to(p_out.dtype.element_ty), mask=m_chosen)


@triton.jit
def choose_few(p_scores, p_pages, p_out, visible, num_window_rows, PER_PAGE: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """Choose among at most ``SIZE`` scores."""
    b_entry = tl.arange(0, SIZE)
    m_s = b_entry < visible
    b_score = tl.load(p_scores + b_entry, mask=m_s, other=0.0)  # [SIZE]
    m_chosen, b_place = choose(order_key(b_score, m_s), m_s, K)
    store_rows(p_pages, p_out, b_entry, m_chosen, b_place, num_window_rows, PER_PAGE)


@triton.jit(do_not_specialize=["first_token", "page_stride", "num_window_rows"])
def topk_entries_kernel(
    p_positions,
    p_token_rows,
    p_pages,
    page_stride,
    first_token,
    p_scores,
    score_stride,
    p_maxima,
    maxima_stride,
    p_groups,
    p_out,
    out_stride,
    num_window_rows,
    RATIO: tl.constexpr,
    PER_PAGE: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
    PAD: tl.constexpr,
):
    """One token per program: all it sees if that is at most ``K`` entries, or the best of its scores."""
    i_t = tl.program_id(0).to(tl.int64)
    token = first_token + i_t
    visible = visible_entries(p_positions, token, RATIO)
    p_out += token * out_stride
    p_table = p_pages + tl.load(p_token_rows + token) * page_stride
    p_scores += i_t * score_stride
    if visible <= K:
        o_k = tl.arange(0, K_BLOCK)  # [K]
        b_page = tl.load(p_table + o_k // PER_PAGE, mask=o_k < visible, other=0)
        b_slot = num_window_rows + b_page * PER_PAGE + o_k % PER_PAGE
        b_slot = tl.where(o_k < visible, b_slot, -1).to(p_out.dtype.element_ty)
        tl.store(p_out + o_k, b_slot, mask=o_k < (K if PAD else visible))
    elif visible <= SMALL:
        choose_few(p_scores, p_table, p_out, visible, num_window_rows, PER_PAGE, K, SMALL)
    elif visible <= SIZE:
        choose_few(p_scores, p_table, p_out, visible, num_window_rows, PER_PAGE, K, SIZE)
    elif LEVELS > 1:
        p_maxima += i_t * maxima_stride
        p_groups += i_t * K
        num_groups = tl.cdiv(visible, GROUP)
        if num_groups <= SMALL:
            choose_groups(p_maxima, p_groups, num_groups, K, SMALL)
        elif num_groups <= SIZE:
            choose_groups(p_maxima, p_groups, num_groups, K, SIZE)
        elif LEVELS > 2:
            o_s = tl.arange(0, SIZE)
            b_best = largest_maxima(p_maxima, num_groups, SIZE, GROUP)
            m_s = o_s < tl.cdiv(num_groups, GROUP)
            m_chosen, b_place = choose(order_key(b_best, m_s), m_s, K)
            store_groups(p_groups, o_s, m_chosen, b_place)
            b_group = members(p_groups, K, SIZE, GROUP)
            m_s = b_group < num_groups
            b_best = tl.load(p_maxima + b_group, mask=m_s, other=0.0)
            m_chosen, b_place = choose(order_key(b_best, m_s), m_s, K)
            store_groups(p_groups, b_group, m_chosen, b_place)
        b_entry = members(p_groups, K, SIZE, GROUP)
        m_s = b_entry < visible
        b_score = tl.load(p_scores + b_entry, mask=m_s, other=0.0)  # [SIZE]
        m_chosen, b_place = choose(order_key(b_score, m_s), m_s, K)
        store_rows(p_table, p_out, b_entry, m_chosen, b_place, num_window_rows, PER_PAGE)


def topk_entries(
    step: StepTensors,
    scores: torch.Tensor,
    maxima: torch.Tensor,
    first_token: int,
    ratio: int,
    out: torch.Tensor,
    groups: torch.Tensor,
    pad: bool = True,
) -> None:
    """`naive_topk_entries` for some tokens of a step, in one launch, written as rows of the row pool.

    Args:
        step (StepTensors): the step; a token of position -1 is padding.
        scores (torch.Tensor): ``[N, S]`` fp32, of tokens ``first_token ..``. Nothing is read of tokens that see at most k
            entries, nor past the visible ones of any token.
        maxima (torch.Tensor): ``[N, S / 8]`` fp32, the largest of each eight visible scores. Nothing is read of tokens that
            see at most ``8 k`` entries.
        first_token (int): the first of these tokens.
        ratio (int): tokens per entry.
        out (torch.Tensor): ``[T, k]`` int32. Rows ``first_token .. first_token+N-1`` are written: rows of the row pool in
            the entries' order, then -1.
        groups (torch.Tensor): ``[N or more, k]`` int32, scratch.
        pad (bool): write -1 behind the chosen entries of a token that sees fewer than k; else these cells are left alone.

    Raises:
        ValueError: a tensor's shape or strides, or more entries than can be ranked.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: out, groups.
    """
    num_tokens, max_entries = scores.shape
    k = out.shape[1]
    for name, tensor in (("scores", scores), ("maxima", maxima), ("out", out), ("history_pages", step.history_pages)):
        check_rows(name, tensor)
    for name, tensor in (("positions", step.positions), ("token_rows", step.token_rows), ("groups", groups)):
        check_contiguous(name, tensor)
    size, small, levels = topk_levels(max_entries, k)
    if len(groups) < num_tokens or groups.shape[1] != k:
        raise ValueError(f"groups: expected at least ({num_tokens}, {k}), got {tuple(groups.shape)}")
    if levels > 1 and maxima.shape[1] * GROUP < max_entries:
        raise ValueError(f"maxima: expected one of each {GROUP} of {max_entries} scores, got {maxima.shape[1]}")
    if num_tokens == 0:
        return
    topk_entries_kernel[(num_tokens,)](
        p_positions=step.positions,
        p_token_rows=step.token_rows,
        p_pages=step.history_pages,
        page_stride=step.history_pages.stride(0),
        first_token=first_token,
        p_scores=scores,
        score_stride=scores.stride(0),
        p_maxima=maxima,
        maxima_stride=maxima.stride(0),
        p_groups=groups,
        p_out=out,
        out_stride=out.stride(0),
        num_window_rows=step.num_window_rows,
        RATIO=ratio,
        PER_PAGE=step.page_tokens // ratio,
        K=k,
        K_BLOCK=triton.next_power_of_2(k),
        SMALL=small,
        SIZE=size,
        GROUP=GROUP,
        LEVELS=levels,
        PAD=pad,
        num_warps=WARPS,
        maxnreg=topk_registers(num_tokens, levels),
    )
