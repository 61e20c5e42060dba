"""Scratch of the fused indexer."""

from typing import NamedTuple

import torch
import triton

from dsv4_kernels.index_topk.tuning import GROUP
from dsv4_kernels.layout import FP8_INDEX, INDEX_DIM, RowFormat
from dsv4_kernels.memory import empty
from dsv4_kernels.step import StepTensors

# The smallest number of heads that a tensor core's tile takes; missing heads are zero.
_MIN_HEADS = 16


class IndexWorkspace(NamedTuple):
    """Scratch of `select_entries`, from `index_workspace`. One call at a time may use it; nothing in it needs clearing.

    ``query`` and ``weights`` are a piece's rounded queries, in the keys' own storage type, and the heads' weights times the
    queries' scales. ``scores`` and ``maxima`` are flat: `held_scores` cuts them into rows as long as a step needs, so that
    short contexts take few pieces. ``groups`` is `topk_entries`' own.
    """

    query: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor
    maxima: torch.Tensor
    first_tiles: torch.Tensor
    groups: torch.Tensor

    @property
    def stored_query(self) -> torch.Tensor:
        """``query`` as kernels address it: e4m3 numbers are bytes."""
        return self.query.view(torch.uint8) if self.query.dtype == torch.float8_e4m3fn else self.query


class HeldScores(NamedTuple):
    """The scores of a piece: ``scores`` ``[tokens, entries that the page tables can hold]``, and ``maxima`` of each 8."""

    scores: torch.Tensor
    maxima: torch.Tensor


def padded_heads(heads: int) -> int:
    """Heads of a workspace's queries."""
    return max(_MIN_HEADS, triton.next_power_of_2(heads))


def index_workspace(
    max_tokens: int, max_scores: int, heads: int, k: int, key_format: RowFormat, device: torch.device
) -> IndexWorkspace:
    """Allocate the scratch of `select_entries`.

    Args:
        max_tokens (int): tokens that are scored together, at most; a longer step is scored in pieces.
        max_scores (int): scores held at once, 4.5 bytes each: this bounds the pieces too. At least those of one token.
        heads (int): index heads.
        k (int): entries to choose.
        key_format (RowFormat): the keys' format.
        device (torch.device): where it lives.
    """
    padded = padded_heads(heads)
    query = torch.float8_e4m3fn if key_format is FP8_INDEX else key_format.storage_dtype
    return IndexWorkspace(
        query=empty((max_tokens, padded, INDEX_DIM), query, device),
        weights=empty((max_tokens, padded), torch.float32, device),
        scores=empty((max_scores,), torch.float32, device),
        maxima=empty((max_scores // GROUP,), torch.float32, device),
        first_tiles=empty((max_tokens + 1,), torch.int32, device),
        groups=empty((max_tokens, k), torch.int32, device),
    )


def held_scores(step: StepTensors, ratio: int, workspace: IndexWorkspace) -> HeldScores:
    """A workspace's scores as rows for the tokens of a piece.

    Raises:
        ValueError: it cannot hold one token's.
    """
    entries = step.history_pages.shape[1] * step.page_tokens // ratio
    rows = min(len(workspace.query), len(workspace.scores) // max(1, entries))
    if rows == 0:
        raise ValueError(f"workspace: expected room for {entries} scores, got {len(workspace.scores)}")
    count = rows * entries
    return HeldScores(
        workspace.scores[:count].view(rows, entries), workspace.maxima[: count // GROUP].view(rows, entries // GROUP)
    )
