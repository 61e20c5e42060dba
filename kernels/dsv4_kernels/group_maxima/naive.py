"""Reference of the maxima of groups."""

import torch


def naive_group_maxima(scores: torch.Tensor, num_visible: torch.Tensor, group: int, maxima: torch.Tensor) -> None:
    """The largest visible score of each group of a row.

    Equation: maxima[n, g] = max of scores[n, s] over s in group g, s < num_visible[n]      [GROUP-MAX]

    Args:
        scores (torch.Tensor): ``[N, S]`` fp32; columns past a row's visible ones may hold anything.
        num_visible (torch.Tensor): ``[N]``, visible scores of each row, the first ones.
        group (int): scores of a group.
        maxima (torch.Tensor): ``[N, S / group]`` fp32. Written for groups that have a visible score.
    """
    hidden = torch.arange(scores.shape[1], device=scores.device) >= num_visible.unsqueeze(1)
    found = scores.masked_fill(hidden, float("-inf")).unflatten(1, (-1, group))  # [N, groups, group]
    written = ~hidden[:, ::group]
    maxima[written] = found.amax(2)[written]
