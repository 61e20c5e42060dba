"""Fused maxima of groups: every visible score is read once."""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import check_contiguous, check_rows
from dsv4_kernels.index_topk.fused import visible_entries
from dsv4_kernels.index_topk.tuning import GROUP

# Groups of a program.
_GROUPS = 512


@triton.jit(do_not_specialize=["first_token"])
def group_maxima_kernel(
    p_positions,
    first_token,
    p_scores,
    score_stride,
    p_maxima,
    maxima_stride,
    RATIO: tl.constexpr,
    FEWEST: tl.constexpr,
    GROUP: tl.constexpr,
    BG: tl.constexpr,
):
    """``BG`` groups of one token, unless it sees no more than ``FEWEST`` entries."""
    i_t = tl.program_id(0).to(tl.int64)
    visible = visible_entries(p_positions, first_token + i_t, RATIO)
    first = tl.program_id(1) * BG
    if (visible > FEWEST) & (first * GROUP < visible):
        o_g = first + tl.arange(0, BG)
        o_s = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BG, GROUP]
        p_row = p_scores + i_t * score_stride
        b_score = tl.load(p_row + o_s, mask=o_s < visible, other=float("-inf"))
        b_best = tl.max(b_score, axis=1)  # [BG]
        tl.store(p_maxima + i_t * maxima_stride + o_g, b_best, mask=o_g * GROUP < visible)


def group_maxima(
    positions: torch.Tensor, first_token: int, ratio: int, scores: torch.Tensor, maxima: torch.Tensor, fewest: int
) -> None:
    """`naive_group_maxima` of the scores of some tokens of a step, groups of `dsv4_kernels.index_topk.GROUP`.

    Args:
        positions (torch.Tensor): ``[T]`` int64, of the step.
        first_token (int): token of the first row.
        ratio (int): tokens per entry.
        scores (torch.Tensor): ``[N, S]`` fp32.
        maxima (torch.Tensor): ``[N, S / 8]`` fp32. Written.
        fewest (int): rows of tokens that see no more entries than this are left alone.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: maxima.
    """
    check_rows("scores", scores)
    check_rows("maxima", maxima)
    check_contiguous("positions", positions)
    num_tokens, num_groups = maxima.shape
    if tuple(scores.shape) != (num_tokens, num_groups * GROUP):
        raise ValueError(f"scores: expected ({num_tokens}, {num_groups * GROUP}), got {tuple(scores.shape)}")
    if scores.numel() == 0:
        return
    group_maxima_kernel[(num_tokens, triton.cdiv(num_groups, _GROUPS))](
        p_positions=positions,
        first_token=first_token,
        p_scores=scores,
        score_stride=scores.stride(0),
        p_maxima=maxima,
        maxima_stride=maxima.stride(0),
        RATIO=ratio,
        FEWEST=fewest,
        GROUP=GROUP,
        BG=_GROUPS,
        num_warps=4,
    )
