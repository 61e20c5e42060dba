"""Fused row lists: one launch, straight into the buffer that an attention kernel reads."""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import check_contiguous, check_rows, zero_like
from dsv4_kernels.row_lists.kind import ListKind
from dsv4_kernels.step import StepTensors


@triton.jit(do_not_specialize=["page_stride", "list_stride", "selected_stride", "width", "num_window_rows"])
def row_lists_kernel(
    p_positions,
    p_token_rows,
    p_window_pages,
    p_history_pages,
    page_stride,
    p_selected,
    selected_stride,
    p_lists,
    list_stride,
    p_lengths,
    width,
    num_window_rows,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    MOST: tl.constexpr,
    PAGE: tl.constexpr,
    WRITE_WINDOW: tl.constexpr,
    ENTRIES: tl.constexpr,
    PAD: tl.constexpr,
    BC: tl.constexpr,
):
    """``BC`` columns of one query's list. ``ENTRIES``: 0 leaves them, 1 lists every visible one, 2 the selected ones."""
    i_t = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    b_position = tl.load(p_positions + i_t)
    b_row = tl.load(p_token_rows + i_t)
    b_window = tl.minimum(b_position + 1, WINDOW)
    b_entries = zero_like(b_window)
    if RATIO > 0:
        b_entries = tl.minimum((b_position + 1) // RATIO, MOST)
    p_list = p_lists + i_t * list_stride + o_c
    m_entry = o_c < b_entries
    if ENTRIES == 1:
        PER_PAGE: tl.constexpr = PAGE // RATIO
        b_page = tl.load(p_history_pages + b_row * page_stride + o_c // PER_PAGE, mask=m_entry, other=0)
        b_slot = num_window_rows + b_page * PER_PAGE + o_c % PER_PAGE
        tl.store(p_list, b_slot.to(tl.int32), mask=m_entry)
    if ENTRIES == 2:
        b_slot = tl.load(p_selected + i_t * selected_stride + o_c, mask=m_entry, other=0)
        tl.store(p_list, b_slot.to(tl.int32), mask=m_entry)
    o_w = o_c - b_entries  # [BC], place in the window
    m_window = (o_w >= 0) & (o_w < b_window)
    if WRITE_WINDOW:
        b_reached = b_position + 1 - b_window + o_w
        b_page = tl.load(p_window_pages + b_row * page_stride + b_reached // PAGE, mask=m_window, other=0)
        tl.store(p_list, (b_page * PAGE + b_reached % PAGE).to(tl.int32), mask=m_window)
    if PAD:
        tl.store(p_list, -1, mask=(o_w >= b_window) & (o_c < width))
    if p_lengths is not None:
        # A length of 0 would be a list without a tile, which FlashMLA does not expect; -1 is skipped.
        b_length = tl.maximum(b_entries + b_window, 1).to(tl.int32)
        tl.store(p_lengths + i_t, b_length, mask=tl.program_id(1) == 0)


def row_lists(
    step: StepTensors,
    kind: ListKind,
    lists: torch.Tensor,
    selected: torch.Tensor | None = None,
    *,
    window: bool = True,
    pad: bool = False,
    lengths: torch.Tensor | None = None,
) -> None:
    """`naive_row_lists` in one launch; arguments as there.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: lists, lengths.
    """
    check_rows("lists", lists)
    if lengths is not None:
        check_contiguous("lengths", lengths)
    check_contiguous("positions", step.positions)
    check_contiguous("token_rows", step.token_rows)
    if step.window_pages.stride() != step.history_pages.stride() or step.window_pages.stride(-1) != 1:
        raise ValueError(
            f"page tables: expected equal strides and rows of stride 1, got {step.window_pages.stride()} and "
            f"{step.history_pages.stride()}"
        )
    num_tokens, width = lists.shape
    if num_tokens == 0:
        return
    entries = 0
    if kind.ratio and kind.most is None:
        entries = 1
    elif selected is not None and selected.shape[1]:
        check_rows("selected", selected)
        entries = 2
    block = min(1024, triton.next_power_of_2(width))
    row_lists_kernel[(num_tokens, triton.cdiv(width, block))](
        p_positions=step.positions,
        p_token_rows=step.token_rows,
        p_window_pages=step.window_pages,
        p_history_pages=step.history_pages,
        page_stride=step.window_pages.stride(0),
        p_selected=selected,
        selected_stride=0 if selected is None else selected.stride(0),
        p_lists=lists,
        list_stride=lists.stride(0),
        p_lengths=lengths,
        width=width,
        num_window_rows=step.num_window_rows,
        WINDOW=kind.window,
        RATIO=kind.ratio,
        MOST=(1 << 40) if kind.most is None else kind.most,
        PAGE=step.page_tokens,
        WRITE_WINDOW=window,
        ENTRIES=entries,
        PAD=pad,
        BC=block,
        num_warps=4,
    )
