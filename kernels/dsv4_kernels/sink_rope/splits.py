"""Attention that was computed in pieces."""

from typing import NamedTuple

import torch


class Splits(NamedTuple):
    """Partial results of queries whose keys several lanes shared. A lane has two slots: ``2 * lane`` for the query that it
    goes on with, ``2 * lane + 1`` for the one that it begins.

    Attributes:
        first_lane (torch.Tensor): ``[T]`` int32, lane of each query's first piece; the others follow in the next lanes.
        num_pieces (torch.Tensor): ``[T]`` int32; 1: the result is not in here.
        partial (torch.Tensor): ``[2 * lanes, H, D]``, each piece's attention.
        partial_lse (torch.Tensor): ``[2 * lanes, H]`` fp32, its log-sum-exp to base 2.
    """

    first_lane: torch.Tensor
    num_pieces: torch.Tensor
    partial: torch.Tensor
    partial_lse: torch.Tensor
