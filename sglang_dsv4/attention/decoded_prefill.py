"""Steps whose rows are decoded once: the pages that a step reads, and the numbers of their rows among the decoded ones.

Decoded pages lie one after another, first the window pages of every request, then their history pages. A step over these
numbers instead of the pool's is a step like any other: `row_lists` and `LayerCache.select` write its lists.
"""

from dataclasses import dataclass, replace

import torch

from dsv4_kernels.page_decode import num_page_rows
from dsv4_kernels.step import StepTensors
from sglang_dsv4.attention.host_lengths import HostLengths
from sglang_dsv4.spec import CacheSpec

# Measured on an H200: at 8,192 tokens FlashMLA's prefill kernel over decoded rows takes two thirds of the time of its decode
# kernel over packed ones, and needs no schedule. Decoding a row costs about a hundredth of what a token gains, so 64 rows a
# token leave a third of the gain. To number the rows takes the host half a millisecond a step: short steps wait for the host.
FEWEST_TOKENS = 1024
MOST_ROWS_PER_TOKEN = 64
MAX_DECODED_BYTES = 256 << 20
_VALUE_BYTES = 2  # of bf16


@dataclass(frozen=True)
class PageCounts:
    """Pages that a step's queries read, of all requests together."""

    num_window: int
    num_history: int


@dataclass(frozen=True)
class DecodedStep:
    """A step over decoded rows.

    Attributes:
        step (StepTensors): the step, with tables and ``num_window_rows`` of the decoded rows.
        window_pages (torch.Tensor): ``[W]`` int64, the pool's window pages in the order in which they are decoded.
        history_pages (torch.Tensor): ``[H]`` int64, the pool's history pages in that order.
    """

    step: StepTensors
    window_pages: torch.Tensor
    history_pages: torch.Tensor

    def num_rows(self, ratio: int) -> int:
        """Decoded rows of a layer with entries of ``ratio`` tokens; 0 for one without."""
        window, history = len(self.window_pages), len(self.history_pages)
        return num_page_rows(window, history, self.step.page_tokens, ratio)


def count_pages(lengths: HostLengths, page_tokens: int, window: int) -> PageCounts:
    """Pages that queries read: history up to a request's end, and the window of its first new token and all after it.

    Args:
        lengths (HostLengths): the step's lengths; a request without new tokens has no queries.
        page_tokens (int): tokens per page.
        window (int): rows that a query's window has at most, its own included.
    """
    num_window = num_history = 0
    for end, count in zip(lengths.seq_lens, lengths.extend_lens, strict=True):
        if count:
            first = max(0, end - count - (window - 1)) // page_tokens
            num_window += (end - 1) // page_tokens - first + 1
            num_history += -(-end // page_tokens)
    return PageCounts(num_window, num_history)


def choose_decoded(lengths: HostLengths, spec: CacheSpec) -> PageCounts | None:
    """The pages to decode, where that is faster than to read packed rows; None where not. By the lengths alone."""
    num_tokens = sum(lengths.extend_lens)
    if num_tokens < FEWEST_TOKENS:
        return None
    counts = count_pages(lengths, spec.page_tokens, spec.window)
    most = max(num_page_rows(counts.num_window, counts.num_history, spec.page_tokens, layer.ratio) for layer in spec.layers)
    room = MAX_DECODED_BYTES // (_VALUE_BYTES * spec.head_dim)
    return counts if most <= min(room, MOST_ROWS_PER_TOKEN * num_tokens) else None


def decoded_step(step: StepTensors, counts: PageCounts, window: int) -> DecodedStep:
    """Number the rows of the pages that a step reads, without asking the device.

    Args:
        step (StepTensors): the step over the pool.
        counts (PageCounts): of `count_pages`, of the same lengths as the step's tensors.
        window (int): rows that a query's window has at most.
    """
    page_tokens, ends, extends = step.page_tokens, step.seq_lens, step.extend_lens
    reads = extends > 0
    first = (ends - extends - (window - 1)).clamp_min(0) // page_tokens
    num_window = ((ends - 1) // page_tokens - first + 1) * reads
    num_history = (ends + page_tokens - 1) // page_tokens * reads
    window_pages, window_places = _gather_pages(step.window_pages, first, num_window, counts.num_window)
    history_pages, history_places = _gather_pages(step.history_pages, torch.zeros_like(first), num_history, counts.num_history)
    numbered = replace(
        step, window_pages=window_places, history_pages=history_places, num_window_rows=counts.num_window * page_tokens
    )
    return DecodedStep(numbered, window_pages, history_pages)


def _gather_pages(
    table: torch.Tensor, first: torch.Tensor, counts: torch.Tensor, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``counts`` cells of each row of a page table from ``first`` on, row after row; they are ``total``.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: ``[total]``, their pages; and as large as the table, each cell's place among them,
        which for other cells may be any number.
    """
    base = counts.cumsum(0) - counts - first
    rows = torch.repeat_interleave(counts, output_size=total)
    columns = torch.arange(total, device=table.device) - base[rows]
    places = base.unsqueeze(1) + torch.arange(table.shape[1], device=table.device)
    return table[rows, columns], places
