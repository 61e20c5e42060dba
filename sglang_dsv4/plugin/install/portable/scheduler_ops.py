"""SGLang's slot allocation in plain torch, for machines on which its Triton kernels cannot be launched."""

from collections.abc import Callable
from typing import Any

import torch

PADDING_PAGE = 0


def no_triton(backend: str) -> bool:
    """Whether an attention backend may use Triton: never here, so that SGLang takes its own torch paths.

    Args:
        backend (str): name of an attention backend.
    """
    del backend
    return False


class Launchable:
    """A function called as Triton kernels are: ``kernel[grid](...)``.

    Args:
        function (Callable[..., None]): takes the kernel's arguments, writes the kernel's outputs.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        del grid
        return self._function


def _pages_for(num_tokens: torch.Tensor, page_size: int) -> torch.Tensor:
    return (num_tokens + page_size - 1) // page_size


def _page_ids(free_pages: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """The free pages of these ranks. Past the last one stands the padding page: SGLang discards such an allocation."""
    padded = torch.cat([free_pages, free_pages.new_full((1,), PADDING_PAGE)])
    return padded[ranks.clamp(max=len(free_pages))]


def naive_alloc_extend(
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    bs_upper: int,
    page_size: int,
) -> None:
    """Give each request slots for tokens ``prefix_len .. seq_len - 1``: the rest of its last page, then free pages.

    Requests take free pages in order, each as many as it needs.

    Args:
        prefix_lens (torch.Tensor): ``[B]``, tokens that have a slot.
        seq_lens (torch.Tensor): ``[B]``, tokens that shall have one.
        last_loc (torch.Tensor): ``[B]``, slot of token ``prefix_len - 1``; -1 where there is none.
        free_pages (torch.Tensor): ``[F]``, page ids.
        out_indices (torch.Tensor): ``[sum(seq_lens - prefix_lens)]``, int64, written: slots, request after request.
        bs_upper (int): unused; a launch parameter.
        page_size (int): tokens per page.
    """
    del bs_upper
    extend_lens = seq_lens - prefix_lens
    first_out = extend_lens.cumsum(0) - extend_lens
    old_pages = _pages_for(prefix_lens, page_size)
    new_pages = _pages_for(seq_lens, page_size) - old_pages
    first_free = new_pages.cumsum(0) - new_pages

    rows = torch.arange(len(seq_lens), device=seq_lens.device).repeat_interleave(extend_lens.long())  # [N]
    offset = torch.arange(len(rows), device=seq_lens.device) - first_out[rows]
    position = prefix_lens[rows] + offset
    rank = position // page_size - old_pages[rows]  # which of the request's new pages; -1: its last old one
    fresh = _page_ids(free_pages, (first_free[rows] + rank).clamp(min=0)) * page_size + position % page_size
    out_indices.copy_(torch.where(rank < 0, last_loc[rows] + 1 + offset, fresh))


def naive_alloc_decode(
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    bs_upper: int,
    page_size: int,
) -> None:
    """Give each request a slot for its token ``seq_len - 1``: behind the last one, or at the start of a free page.

    Args:
        seq_lens (torch.Tensor): ``[B]``, tokens with the new one.
        last_loc (torch.Tensor): ``[B]``, slot of token ``seq_len - 2``.
        free_pages (torch.Tensor): ``[F]``, page ids.
        out_indices (torch.Tensor): ``[B]``, int64, written.
        bs_upper (int): unused; a launch parameter.
        page_size (int): tokens per page.
    """
    naive_alloc_extend(seq_lens - 1, seq_lens, last_loc, free_pages, out_indices, bs_upper, page_size)


alloc_extend = Launchable(naive_alloc_extend)
alloc_decode = Launchable(naive_alloc_decode)
