"""Reference step plan, and the buffers it fills."""

from dataclasses import replace

import torch

from dsv4_kernels.memory import empty
from dsv4_kernels.step import StepTensors


def step_buffers(
    max_requests: int, max_tokens: int, max_pages: int, page_tokens: int, num_window_rows: int, device: torch.device | str
) -> StepTensors:
    """Allocate the tensors of the largest step; they hold nothing until a step is planned into them."""

    def tensor(*shape: int) -> torch.Tensor:
        return empty(shape, torch.int64, device)

    return StepTensors(
        positions=tensor(max_tokens),
        token_rows=tensor(max_tokens),
        seq_lens=tensor(max_requests),
        extend_lens=tensor(max_requests),
        state_slots=tensor(max_requests),
        history_pages=tensor(max_requests, max_pages),
        window_pages=tensor(max_requests, max_pages),
        page_tokens=page_tokens,
        num_window_rows=num_window_rows,
    )


def step_part(buffers: StepTensors, num_requests: int, num_tokens: int, num_pages: int) -> StepTensors:
    """Views of buffers for a smaller step: what a graph of that size captures.

    Args:
        buffers (StepTensors): of `step_buffers`.
        num_requests (int): requests, padding included.
        num_tokens (int): tokens, padding included.
        num_pages (int): pages of the longest request.
    """
    given = {"requests": num_requests, "tokens": num_tokens, "pages": num_pages}
    most = (len(buffers.seq_lens), len(buffers.positions), buffers.history_pages.shape[1])
    for (name, count), limit in zip(given.items(), most, strict=True):
        if not 0 <= count <= limit:
            raise ValueError(f"num_{name}: expected 0 .. {limit}, got {count}")
    return replace(
        buffers,
        positions=buffers.positions[:num_tokens],
        token_rows=buffers.token_rows[:num_tokens],
        seq_lens=buffers.seq_lens[:num_requests],
        extend_lens=buffers.extend_lens[:num_requests],
        state_slots=buffers.state_slots[:num_requests],
        history_pages=buffers.history_pages[:num_requests, :num_pages],
        window_pages=buffers.window_pages[:num_requests, :num_pages],
    )


def naive_step_plan(
    out: StepTensors,
    first_tokens: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_lens: torch.Tensor,
    request_rows: torch.Tensor,
    token_slots: torch.Tensor,
    window_slots: torch.Tensor,
) -> None:
    """Fill ``out`` for a step whose new tokens lie one request after another.

    Equation: page of token ``p*page_tokens ..`` of request ``r`` = token_slots[request_rows[r], p*page_tokens] // page_tokens

    Args:
        out (StepTensors): of `step_buffers` or `step_part`, for at least the step's tokens and pages. Written: tokens past
            the last new one become padding, position -1 of row 0; page cells past a request's last page, and of requests
            without new tokens, are left alone.
        first_tokens (torch.Tensor): ``[B]`` int64, new tokens of the requests before each. Written.
        seq_lens (torch.Tensor): ``[B]`` int32 or int64, tokens per request, this step included.
        extend_lens (torch.Tensor): ``[B]`` int32 or int64, new tokens per request; 0 for padding, whose other values may
            be anything in range.
        request_rows (torch.Tensor): ``[B]`` int32 or int64, each request's row of ``token_slots``, and its state slot.
        token_slots (torch.Tensor): ``[R, L]`` int32 or int64, slot of every token; a page's slots are consecutive.
        window_slots (torch.Tensor): ``[N]`` int32 or int64, by token slot, the slot of that token's window row, >= 0.
    """
    page_tokens, device = out.page_tokens, out.positions.device
    out.seq_lens.copy_(seq_lens)
    out.extend_lens.copy_(extend_lens)
    out.state_slots.copy_(request_rows)
    first_tokens.copy_(out.extend_lens.cumsum(0) - out.extend_lens)
    requests = torch.arange(len(seq_lens), device=device)
    rows = torch.repeat_interleave(requests, out.extend_lens)  # [new tokens]
    tokens = torch.arange(len(rows), device=device)
    out.positions.fill_(-1)
    out.token_rows.zero_()
    starts = out.seq_lens - out.extend_lens
    out.positions[: len(rows)] = starts[rows] + tokens - first_tokens[rows]
    out.token_rows[: len(rows)] = rows
    num_pages = (out.seq_lens + page_tokens - 1) // page_tokens * (out.extend_lens > 0)
    columns = torch.arange(out.history_pages.shape[1], device=device)
    row, page = torch.nonzero(columns < num_pages.unsqueeze(1), as_tuple=True)
    slots = token_slots[out.state_slots[row], page * page_tokens].long()
    out.history_pages[row, page] = slots // page_tokens
    out.window_pages[row, page] = window_slots[slots].long() // page_tokens
