"""What one step writes and reads, as tensors. Kernels see this and nothing of requests."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dsv4_kernels.device import check_contiguous


@dataclass(frozen=True)
class StepTensors:
    """One step of a batch: ``B`` requests, ``T`` new tokens in all, a request's tokens contiguous.

    Attributes:
        positions (torch.Tensor): ``[T]`` int64, each new token's position in its request.
        token_rows (torch.Tensor): ``[T]`` int64, each new token's request, ``0 .. B-1``.
        seq_lens (torch.Tensor): ``[B]`` int64, tokens per request, this step included.
        extend_lens (torch.Tensor): ``[B]`` int64, new tokens per request; 0 is allowed.
        state_slots (torch.Tensor): ``[B]`` int64, each request's row in the stream state.
        history_pages (torch.Tensor): ``[B, P]`` int64, page of tokens ``p*page_tokens ..``; entries and index keys live there.
        window_pages (torch.Tensor): ``[B, P]`` int64, likewise for window rows and boundary state. Cells of pages that the
            step neither reads nor writes may hold anything.
        page_tokens (int): tokens per page, a multiple of 128.
        num_window_rows (int): window rows of each row pool; entries follow them.
    """

    positions: torch.Tensor
    token_rows: torch.Tensor
    seq_lens: torch.Tensor
    extend_lens: torch.Tensor
    state_slots: torch.Tensor
    history_pages: torch.Tensor
    window_pages: torch.Tensor
    page_tokens: int
    num_window_rows: int

    def window_slots(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Pool rows of the window rows of ``positions`` in requests ``rows`` (broadcast together)."""
        page = self.window_pages[rows, positions // self.page_tokens]
        return page * self.page_tokens + positions % self.page_tokens

    def index_slots(self, rows: torch.Tensor, entries: torch.Tensor, ratio: int) -> torch.Tensor:
        """Rows of ``entries`` in an index-key pool; also their rows among a row pool's entries."""
        per_page = self.page_tokens // ratio
        return self.history_pages[rows, entries // per_page] * per_page + entries % per_page

    def entry_slots(self, rows: torch.Tensor, entries: torch.Tensor, ratio: int) -> torch.Tensor:
        """Pool rows of ``entries`` in requests ``rows`` (broadcast together)."""
        return self.num_window_rows + self.index_slots(rows, entries, ratio)


class StepPointers(NamedTuple):
    """`StepTensors` inside a kernel."""

    positions: torch.Tensor
    token_rows: torch.Tensor
    seq_lens: torch.Tensor
    extend_lens: torch.Tensor
    state_slots: torch.Tensor
    history_pages: torch.Tensor
    window_pages: torch.Tensor


def step_pointers(step: StepTensors) -> StepPointers:
    """A step as kernel arguments; raises `ValueError` where a tensor is laid out otherwise than kernels expect."""
    for name in ("positions", "token_rows", "seq_lens", "extend_lens", "state_slots"):
        check_contiguous(name, getattr(step, name))
    if step.history_pages.stride() != step.window_pages.stride() or step.history_pages.stride(-1) != 1:
        raise ValueError(
            f"page tables: expected equal strides, the last 1, got {step.history_pages.stride()} and "
            f"{step.window_pages.stride()}"
        )
    return StepPointers(
        step.positions,
        step.token_rows,
        step.seq_lens,
        step.extend_lens,
        step.state_slots,
        step.history_pages,
        step.window_pages,
    )
