"""Reference schedule."""

import torch

from dsv4_kernels.mla_schedule.work import TILE_KEYS, WorkLists
from dsv4_kernels.row_lists.kind import ListKind

# What a second work costs a lane, in tiles: its queries are loaded and its result is stored while no keys are.
SECOND_WORK_TILES = 2
# A piece of ``c`` tiles of a query of ``n`` costs ``c`` tiles' time, and 1/12 of it ``n / c`` times when pieces are merged: the sum
# is least at ``12 c^2 = n``.
PIECE_TILES = 12
# A prefill has this many rounds. Neighbouring queries share rows: those that are attended at one time should be neighbours,
# even if that leaves lanes idle at the end, unless one query alone keeps a lane for half of the time.
MANY_ROUNDS = 2


def naive_mla_schedule(
    positions: torch.Tensor, kind: ListKind, list_stride: int, num_heads: int, work: WorkLists, split: bool = True
) -> None:
    """Share the tiles of all queries' lists out among the lanes. A query without keys counts as one tile.

    Either whole rounds of one query per lane, and the rest cut into pieces of equal size, so few that each lane takes one;
    or one line of all tiles, cut into as many stretches as there are lanes. The first is better for equal lengths, since
    no lane begins a query where another ends, the second for unequal ones.

    Equation:
        tiles_t = max(1, ceil(length_t / 64));  rounds = T // lanes;  line = ceil(sum_t tiles_t / lanes), at least `least`;
        piece = the least of ceil(rest / lanes) ..  with sum over the rest of ceil(tiles_t / piece) <= lanes, in steps of 1/8;
        one line if rounds max_t tiles_t + piece > line + SECOND_WORK_TILES, and MANY_ROUNDS allows it      [SCHEDULE]

    Args:
        positions (torch.Tensor): ``[T]``, of the queries.
        kind (ListKind): whose lists are attended.
        list_stride (int): from one query's list to the next one's.
        num_heads (int): rows of partial results per piece.
        work (WorkLists): written.
        split (bool): whether queries may be cut. Pieces are rounded before they are merged, and where a query is cut depends
            on the others; of whole queries each has its result whatever the others are.
    """
    lanes = work.num_lanes
    lengths = kind.lengths(positions).tolist()
    tiles = [max(1, -(-length // TILE_KEYS)) for length in lengths]
    rounds, line = len(tiles) // lanes, -(-sum(tiles) // lanes)
    rest, most = tiles[rounds * lanes :], max(tiles, default=0)
    least = 1
    while PIECE_TILES * least * least < most:
        least += 1
    line, piece = max(least, line), max(least, -(-sum(rest) // lanes))
    while sum(-(-t // piece) for t in rest) > lanes:
        piece += max(1, piece // 8)
    stretch = rounds * most + piece > line + SECOND_WORK_TILES
    stretch = stretch and (rounds < MANY_ROUNDS or 2 * most > line)
    if not split:
        stretch, piece = False, most
    if stretch:
        rounds, piece = 0, line
    takes: list[list[tuple[int, int, int, int]]] = [[] for _ in range(lanes)]
    begin = 0  # in tiles, on a line of which lane i owns piece * i .. piece * (i + 1)
    for token, count in enumerate(tiles):
        first, pieces = token % lanes, 1
        if token < rounds * lanes:
            takes[first].append((token, 0, count, -1))
        else:
            first, last = begin // piece, (begin + count - 1) // piece
            pieces = last - first + 1
            for lane in range(first, last + 1):
                start, end = max(begin, lane * piece), min(begin + count, (lane + 1) * piece)
                slot = (2 * lane + (lane == first)) * num_heads if pieces > 1 else -1
                takes[lane].append((token, start - begin, end - begin, slot))
            begin += count if stretch else -(-count // piece) * piece
        work.first_lane[token], work.num_pieces[token] = first, pieces
    rows = [
        (token, token * list_stride, slot, lengths[token], start * TILE_KEYS, min(end * TILE_KEYS, lengths[token]))
        for lane in takes
        for token, start, end, slot in lane
    ]
    columns = torch.tensor(rows, dtype=torch.int32).view(-1, 6).T  # [6, works]
    fields = ("query", "list_begin", "partial_row", "list_length", "key_begin", "key_end")
    for name, column in zip(fields, columns, strict=True):
        getattr(work, name)[: len(rows)] = column
    counts = torch.tensor([0, *map(len, takes)])
    work.lane_begin.copy_(counts.cumsum(0))
