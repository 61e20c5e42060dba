"""Reference index scores."""

import torch


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
