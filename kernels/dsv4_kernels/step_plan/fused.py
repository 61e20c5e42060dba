"""Fused step plan: every tensor of a step, in one launch on a grid of static shapes.

One program writes what belongs to requests, some the tokens, the others the page tables. A token's request is the number of
requests that end at or before it: each program of tokens adds up the lengths for itself, which for some hundred requests
takes less time than a second launch.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import check_contiguous, check_rows, zero_like
from dsv4_kernels.step import StepTensors, step_pointers

# Tokens, requests at once, and pages of one program.
_TOKENS, _REQUESTS, _PAGES = 32, 128, 512


class PlanInputs(NamedTuple):
    """What the plan is made from, inside the kernel."""

    seq_lens: torch.Tensor
    extend_lens: torch.Tensor
    request_rows: torch.Tensor
    token_slots: torch.Tensor
    window_slots: torch.Tensor


@triton.jit
def plan_requests(given, out, p_first_tokens, num_requests, BR: tl.constexpr):
    """Lengths, state slots and first tokens of every request."""
    before = zero_like(num_requests)
    for first in range(0, num_requests, BR):
        o_r = first + tl.arange(0, BR)  # [BR]
        m_r = o_r < num_requests
        b_new = tl.load(given.extend_lens + o_r, mask=m_r, other=0).to(tl.int32)
        b_seq = tl.load(given.seq_lens + o_r, mask=m_r, other=0).to(tl.int64)
        b_row = tl.load(given.request_rows + o_r, mask=m_r, other=0).to(tl.int64)
        b_first = before + tl.cumsum(b_new, axis=0) - b_new
        tl.store(out.seq_lens + o_r, b_seq, mask=m_r)
        tl.store(out.extend_lens + o_r, b_new.to(tl.int64), mask=m_r)
        tl.store(out.state_slots + o_r, b_row, mask=m_r)
        tl.store(p_first_tokens + o_r, b_first.to(tl.int64), mask=m_r)
        before += tl.sum(b_new, axis=0)


@triton.jit
def plan_tokens(given, out, block, num_requests, num_tokens, BT: tl.constexpr, BR: tl.constexpr):
    """Positions and rows of ``BT`` tokens."""
    o_t = block * BT + tl.arange(0, BT)  # [BT]
    m_t = o_t < num_tokens
    b_row = tl.zeros([BT], tl.int32)
    b_first = tl.zeros([BT], tl.int32)
    before = zero_like(num_requests)
    for first in range(0, num_requests, BR):
        o_r = first + tl.arange(0, BR)  # [BR]
        m_r = o_r < num_requests
        b_new = tl.load(given.extend_lens + o_r, mask=m_r, other=0).to(tl.int32)
        b_end = (before + tl.cumsum(b_new, axis=0))[None, :]
        m_past = (b_end <= o_t[:, None]) & m_r[None, :]  # [BT, BR]
        b_row += tl.sum(m_past.to(tl.int32), axis=1)
        b_first = tl.maximum(b_first, tl.max(tl.where(m_past, b_end, 0), axis=1))
        before += tl.sum(b_new, axis=0)
    m_new = m_t & (b_row < num_requests)
    b_seq = tl.load(given.seq_lens + b_row, mask=m_new, other=0).to(tl.int64)
    b_new = tl.load(given.extend_lens + b_row, mask=m_new, other=0).to(tl.int64)
    b_position = tl.where(m_new, b_seq - b_new + o_t - b_first, -1)
    tl.store(out.positions + o_t, b_position, mask=m_t)
    tl.store(out.token_rows + o_t, tl.where(m_new, b_row, 0).to(tl.int64), mask=m_t)


@triton.jit
def plan_pages(given, out, row, block, num_pages, slot_stride, page_stride, PAGE: tl.constexpr, BP: tl.constexpr):
    """``BP`` cells of a request's page tables, as far as its tokens reach."""
    used = tl.cdiv(tl.load(given.seq_lens + row), PAGE).to(tl.int32)
    used = tl.where(tl.load(given.extend_lens + row) > 0, tl.minimum(used, num_pages), 0)
    if block * BP < used:
        o_p = block * BP + tl.arange(0, BP)  # [BP]
        m_p = o_p < used
        p_slots = given.token_slots + tl.load(given.request_rows + row).to(tl.int64) * slot_stride
        b_slot = tl.load(p_slots + o_p * PAGE, mask=m_p, other=0).to(tl.int64)
        b_window = tl.load(given.window_slots + b_slot, mask=m_p, other=0).to(tl.int64)
        o_cell = row * page_stride + o_p
        tl.store(out.history_pages + o_cell, b_slot // PAGE, mask=m_p)
        tl.store(out.window_pages + o_cell, b_window // PAGE, mask=m_p)


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "num_pages", "slot_stride", "page_stride"])
def step_plan_kernel(
    given,
    out,
    p_first_tokens,
    num_requests,
    num_tokens,
    num_pages,
    slot_stride,
    page_stride,
    PAGE: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """The first program plans requests, the next ones tokens, the rest page tables."""
    i_p = tl.program_id(0)
    token_programs = tl.cdiv(num_tokens, BT)
    if i_p == 0:
        plan_requests(given, out, p_first_tokens, num_requests, BR)
    elif i_p <= token_programs:
        plan_tokens(given, out, i_p - 1, num_requests, num_tokens, BT, BR)
    else:
        blocks = tl.cdiv(num_pages, BP)
        i_p = i_p - 1 - token_programs
        row = (i_p // blocks).to(tl.int64)
        plan_pages(given, out, row, i_p % blocks, num_pages, slot_stride, page_stride, PAGE, BP)


class StepPlanLaunch:
    """`step_plan` of tensors that stay where they are.

    Arguments are checked once, and once the kernel is compiled its launch needs a third of the host's time: in a decode step
    that a graph replays, the plan is the only launch.

    Args:
        out, first_tokens, seq_lens, extend_lens, request_rows, token_slots, window_slots: as `step_plan` has them.

    Raises:
        ValueError: a tensor's length or strides.
    """

    def __init__(
        self,
        out: StepTensors,
        first_tokens: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_lens: torch.Tensor,
        request_rows: torch.Tensor,
        token_slots: torch.Tensor,
        window_slots: torch.Tensor,
    ) -> None:
        num_requests, num_tokens = len(out.seq_lens), len(out.positions)
        num_pages = out.history_pages.shape[1]
        check_rows("token_slots", token_slots)
        for name, tensor, length in (
            ("seq_lens", seq_lens, num_requests),
            ("extend_lens", extend_lens, num_requests),
            ("request_rows", request_rows, num_requests),
            ("first_tokens", first_tokens, num_requests),
            ("window_slots", window_slots, len(window_slots)),
        ):
            check_contiguous(name, tensor)
            if len(tensor) != length:
                raise ValueError(f"{name}: expected {length} requests, got {len(tensor)}")
        page_programs = num_requests * triton.cdiv(num_pages, _PAGES)
        self._grid = (1 + triton.cdiv(num_tokens, _TOKENS) + page_programs, 1, 1)
        # In the kernel's order.
        self._arguments = (
            PlanInputs(seq_lens, extend_lens, request_rows, token_slots, window_slots),
            step_pointers(out),
            first_tokens,
            num_requests,
            num_tokens,
            num_pages,
            token_slots.stride(0),
            out.history_pages.stride(0),
            out.page_tokens,
            _TOKENS,
            _REQUESTS,
            _PAGES,
        )
        self._compiled: Any = None

    def __call__(self) -> None:
        """Launch it."""
        if self._compiled is None:
            self._compiled = step_plan_kernel[self._grid](*self._arguments, num_warps=4)
        else:
            self._compiled[self._grid](*self._arguments)


def step_plan(
    out: StepTensors,
    first_tokens: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_lens: torch.Tensor,
    request_rows: torch.Tensor,
    token_slots: torch.Tensor,
    window_slots: torch.Tensor,
) -> None:
    """`naive_step_plan` in one launch; arguments as there.

    The device cannot refuse a step that is larger than ``out``: its last tokens or pages would be missing. Whoever knows the
    lengths on the host compares them first.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: out, first_tokens.
    """
    StepPlanLaunch(out, first_tokens, seq_lens, extend_lens, request_rows, token_slots, window_slots)()
