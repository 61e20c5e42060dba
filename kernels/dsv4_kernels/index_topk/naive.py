"""Reference top-k."""

import torch


def naive_topk_entries(scores: torch.Tensor, num_visible: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` best visible entries of each row, ties to the lowest index.

    Equation: {s : fewer than k of s' < num_visible[t] have I[t, s'] > I[t, s], or equal to it and s' < s}      [TOPK]

    Args:
        scores (torch.Tensor): ``[T, S]``, fp32; columns past a row's visible ones may hold anything.
        num_visible (torch.Tensor): ``[T]`` int64, entries ``0 .. num_visible-1`` may be chosen.
        k (int): entries per row, > 0.

    Returns:
        torch.Tensor: ``[T, min(k, S)]`` int64, ascending, -1 past the chosen ones.
    """
    num_entries = scores.shape[1]
    entry = torch.arange(num_entries, device=scores.device)
    hidden = entry >= num_visible.unsqueeze(1)  # [T, S]
    scores = scores.masked_fill(hidden, float("-inf"))
    # A stable descending sort keeps equal scores in index order.
    chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = chosen.masked_fill(chosen >= num_visible.unsqueeze(1), num_entries).sort(dim=1).values
    return chosen.masked_fill(chosen == num_entries, -1)
