"""Reference indexer: scores and top-k."""

import torch

from dsv4_kernels.hadamard.naive import naive_hadamard
from dsv4_kernels.norm_rope.naive import naive_rope


def naive_index_query(q: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate index queries as the index keys were.

    Equation: q' = HADAMARD(ROPE_t(q))      [INDEX-Q]

    Args:
        q (torch.Tensor): ``[T, heads, 128]``, the projection.
        cos_sin (torch.Tensor): ``[T, 64]``, fp32, the table's rows at the tokens' positions.

    Returns:
        torch.Tensor: ``[T, heads, 128]``, fp32.
    """
    return naive_hadamard(naive_rope(q, cos_sin))


def naive_index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Score every key for every query token.

    Equation:
        I[t, s] = sum_h w[t, h] ReLU(q[t, h] . k[s])      [INDEX-16]
        Source: report eq. 16; transformers DeepseekV4Indexer.

    Args:
        q (torch.Tensor): ``[T, heads, 128]``, fp32, from `naive_index_query`.
        weights (torch.Tensor): ``[T, heads]``, the scales ``128^-1/2 heads^-1/2`` included.
        keys (torch.Tensor): ``[S, 128]``, fp32.

    Returns:
        torch.Tensor: ``[T, S]``, fp32.
    """
    dots = torch.relu(torch.einsum("thd,sd->ths", q, keys))  # [T, heads, S]
    return torch.einsum("ths,th->ts", dots, weights.float())


def naive_topk_entries(scores: torch.Tensor, num_visible: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` best visible entries of each row, ties to the lowest index.

    Args:
        scores (torch.Tensor): ``[T, S]``, fp32; columns past a row's visible ones may hold anything.
        num_visible (torch.Tensor): ``[T]`` int64, entries ``0 .. num_visible-1`` may be chosen.
        k (int): entries per row, > 0.

    Returns:
        torch.Tensor: ``[T, min(k, S)]`` int64, ascending, -1 past the chosen ones.
    """
    num_entries = scores.shape[1]
    entry = torch.arange(num_entries, device=scores.device)
    hidden = entry >= num_visible.unsqueeze(1)
    scores = scores.masked_fill(hidden, float("-inf"))
    # A stable descending sort keeps equal scores in index order.
    chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = chosen.masked_fill(chosen >= num_visible.unsqueeze(1), num_entries).sort(dim=1).values
    return chosen.masked_fill(chosen == num_entries, -1)
