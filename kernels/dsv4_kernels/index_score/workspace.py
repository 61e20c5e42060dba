"""Scratch of the fused indexer."""

from typing import NamedTuple

import torch
import triton

from dsv4_kernels.index_score.naive import query_dtype
from dsv4_kernels.index_topk.fused import TopkWorkspace, topk_workspace
from dsv4_kernels.layout import INDEX_DIM, RowFormat
from dsv4_kernels.memory import empty
from dsv4_kernels.step import StepTensors

# The smallest number of heads that a tensor core's tile takes; missing heads are zero.
_MIN_HEADS = 16


class IndexWorkspace(NamedTuple):
    """Scratch of `select_entries`, from `index_workspace`. One call at a time may use it; nothing in it needs clearing.

    ``scores`` is flat: `held_scores` cuts it into rows as long as a step needs, so that short contexts take few pieces.
    """

    query: torch.Tensor
    scores: torch.Tensor
    first_tiles: torch.Tensor
    topk: TopkWorkspace


def padded_heads(heads: int) -> int:
    """Heads of a workspace's queries."""
    return max(_MIN_HEADS, triton.next_power_of_2(heads))


def index_workspace(
    max_tokens: int, max_scores: int, heads: int, k: int, key_format: RowFormat, device: torch.device
) -> IndexWorkspace:  # fmt: skip
    """Allocate the scratch of `select_entries`.

    Args:
        max_tokens (int): tokens that are scored together, at most; a longer step is scored in pieces.
        max_scores (int): scores held at once, 4 bytes each: this bounds the pieces too. At least those of one token.
        heads (int): index heads.
        k (int): entries to choose.
        key_format (RowFormat): the keys' format.
        device (torch.device): where it lives.
    """
    return IndexWorkspace(
        query=empty((max_tokens, padded_heads(heads), INDEX_DIM), query_dtype(key_format), device),
        scores=empty((max_scores,), torch.float32, device),
        first_tiles=empty((max_tokens + 1,), torch.int32, device),
        topk=topk_workspace(max_scores, k, device),
    )


def held_scores(step: StepTensors, ratio: int, workspace: IndexWorkspace) -> torch.Tensor:
    """The workspace's scores as ``[tokens of a piece, entries that the page tables can hold]``.

    Raises:
        ValueError: it cannot hold one token's.
    """
    entries = step.history_pages.shape[1] * step.page_tokens // ratio
    rows = min(len(workspace.query), len(workspace.scores) // max(1, entries))
    if rows == 0:
        raise ValueError(
            f"workspace: expected room for {entries} scores, got {len(workspace.scores)}"
        )
    return workspace.scores[: rows * entries].view(rows, entries)
