"""Work lists of a persistent attention kernel."""

from typing import NamedTuple

import torch

TILE_KEYS = 64


class WorkLists(NamedTuple):
    """Which keys of which query each lane takes, in order; a lane is the thread blocks that work on one query together.

    All int32. A lane's works are ``lane_begin[lane] .. lane_begin[lane + 1]``.

    Attributes:
        query (torch.Tensor): ``[works]``, query.
        list_begin (torch.Tensor): ``[works]``, where the query's list begins.
        partial_row (torch.Tensor): ``[works]``, row of the partial results to write to; -1: the result itself.
        list_length (torch.Tensor): ``[works]``, keys of the query.
        key_begin (torch.Tensor): ``[works]``, the piece's first key, a multiple of `TILE_KEYS`.
        key_end (torch.Tensor): ``[works]``, behind its last.
        lane_begin (torch.Tensor): ``[lanes + 1]``.
        first_lane (torch.Tensor): ``[T]``, as in `dsv4_kernels.sink_rope.Splits`.
        num_pieces (torch.Tensor): ``[T]``, likewise.
    """

    query: torch.Tensor
    list_begin: torch.Tensor
    partial_row: torch.Tensor
    list_length: torch.Tensor
    key_begin: torch.Tensor
    key_end: torch.Tensor
    lane_begin: torch.Tensor
    first_lane: torch.Tensor
    num_pieces: torch.Tensor

    @property
    def num_lanes(self) -> int:
        """Lanes."""
        return len(self.lane_begin) - 1


def max_works(num_tokens: int, num_lanes: int) -> int:
    """Works that a schedule can have: one per query, and one more for each lane that goes on with the last one's."""
    return num_tokens + num_lanes
