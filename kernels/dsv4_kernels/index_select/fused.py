"""Fused indexer: three launches for a decode step, or for as many tokens of a prefill as the workspace has rows."""

import torch

from dsv4_kernels.device import check_contiguous, check_rows
from dsv4_kernels.index_query.fused import index_query
from dsv4_kernels.index_score.fused import score_entries
from dsv4_kernels.index_score.tuning import IndexTuning, index_tuning
from dsv4_kernels.index_score.workspace import IndexWorkspace, held_scores, padded_heads
from dsv4_kernels.index_topk.fused import topk_entries
from dsv4_kernels.layout import INDEX_DIM, RowFormat
from dsv4_kernels.step import StepTensors


def select_entries(
    step: StepTensors,
    index_q: torch.Tensor,
    index_weights: torch.Tensor,
    index_pool: torch.Tensor,
    key_format: RowFormat,
    cos_sin: torch.Tensor,
    ratio: int,
    out: torch.Tensor,
    workspace: IndexWorkspace,
    tuning: IndexTuning | None = None,
    pad: bool = True,
    numbering: StepTensors | None = None,
) -> None:
    """`naive_select_entries`; arguments as there.

    Args:
        workspace (IndexWorkspace): of `index_workspace`, for the same heads, k and format.
        tuning (IndexTuning | None): of `index_tuning` if None.
        pad (bool): write -1 behind the entries of a token that sees fewer than ``out`` has room for; else leave these cells.
        numbering (StepTensors | None): number the chosen entries by this step's tables, of the same requests.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: out, workspace.
    """
    num_tokens, k, (scores, maxima) = len(index_weights), out.shape[1], held_scores(step, ratio, workspace)
    check_arguments(step, index_q, index_weights, index_pool, cos_sin, workspace)
    if tuning is None:
        tuning = index_tuning(num_tokens, len(step.seq_lens), key_format.storage_dtype == torch.float32)
    inputs, query = (
        (index_q, index_weights, cos_sin, ratio, k),
        (workspace.stored_query, workspace.weights, workspace.first_tiles),
    )
    listing = step if numbering is None else numbering
    for first in range(0, num_tokens, len(scores)):
        count = min(len(scores), num_tokens - first)
        # Tables of so few pages leave nothing to choose.
        if scores.shape[1] > k:
            index_query(step, *inputs, *query, tuning.unit, tuning.entries, first, count)
            score_entries(step, index_pool, key_format, ratio, k, workspace, tuning, first, count)
        topk_entries(listing, scores[:count], maxima[:count], first, ratio, out, workspace.groups, pad)


def check_arguments(
    step: StepTensors,
    index_q: torch.Tensor,
    index_weights: torch.Tensor,
    index_pool: torch.Tensor,
    cos_sin: torch.Tensor,
    workspace: IndexWorkspace,
) -> None:
    """Raise `ValueError` unless shapes fit the workspace and kernels can address the tensors."""
    num_tokens, heads = index_weights.shape
    padded = padded_heads(heads)
    if tuple(index_q.shape) != (num_tokens, heads, INDEX_DIM):
        raise ValueError(f"index_q: expected ({num_tokens}, {heads}, {INDEX_DIM}), got {tuple(index_q.shape)}")
    if workspace.query.shape[1] != padded:
        raise ValueError(f"workspace: expected {padded} padded heads, got {workspace.query.shape[1]}")
    for name, tensor in (("index_q", index_q), ("index_weights", index_weights), ("history_pages", step.history_pages)):
        check_rows(name, tensor)
    for name, tensor in (
        ("index_pool", index_pool),
        ("cos_sin", cos_sin),
        ("positions", step.positions),
        ("token_rows", step.token_rows),
    ):
        check_contiguous(name, tensor)
