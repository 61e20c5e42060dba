"""Fused schedule: one program per lane, on the device, from positions alone."""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import check_contiguous, zero_like
from dsv4_kernels.mla_schedule.naive import MANY_ROUNDS, PIECE_TILES, SECOND_WORK_TILES
from dsv4_kernels.mla_schedule.work import TILE_KEYS, WorkLists
from dsv4_kernels.row_lists.kind import ListKind


@triton.jit(do_not_specialize=["num_tokens", "list_stride", "num_heads"])
def mla_schedule_kernel(
    p_positions,
    num_tokens,
    list_stride,
    num_heads,
    work,
    num_lanes,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    MOST: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    SECOND: tl.constexpr,
    MANY: tl.constexpr,
    PIECE: tl.constexpr,
    BT: tl.constexpr,
):
    """Every program sees all queries, and writes the works of one lane."""
    i_l = tl.program_id(0)
    o_t = tl.arange(0, BT)  # [BT]
    m_t = o_t < num_tokens
    b_position = tl.load(p_positions + o_t, mask=m_t, other=-1)
    b_length = tl.minimum(b_position + 1, WINDOW)
    if RATIO > 0:
        b_length += tl.minimum((b_position + 1) // RATIO, MOST)
    b_length = b_length.to(tl.int32)
    b_tiles = tl.where(m_t, tl.maximum((b_length + TILE - 1) // TILE, 1), 0)
    b_rounds = num_tokens // num_lanes
    b_rest = tl.where(o_t >= b_rounds * num_lanes, b_tiles, 0)
    b_most = tl.max(b_tiles)
    b_least = zero_like(b_most) + 1
    while PIECE * b_least * b_least < b_most:
        b_least += 1
    b_line = tl.maximum((tl.sum(b_tiles) + num_lanes - 1) // num_lanes, b_least)
    b_piece = tl.maximum((tl.sum(b_rest) + num_lanes - 1) // num_lanes, b_least)
    while tl.sum((b_rest + b_piece - 1) // b_piece) > num_lanes:
        b_piece += tl.maximum(b_piece // 8, 1)
    b_stretch = (b_rounds * b_most + b_piece > b_line + SECOND) & ((b_rounds < MANY) | (2 * b_most > b_line))
    if not SPLIT:
        b_stretch = zero_like(b_most) > 0
        b_piece = b_most
    b_rounds = tl.where(b_stretch, 0, b_rounds)
    b_piece = tl.where(b_stretch, b_line, b_piece)
    b_rest = tl.where(o_t >= b_rounds * num_lanes, b_tiles, 0)
    b_room = tl.where(b_stretch, b_rest, (b_rest + b_piece - 1) // b_piece * b_piece)
    b_begin = tl.cumsum(b_room, axis=0) - b_room  # [BT], in tiles
    b_first = b_begin // b_piece
    b_pieces = tl.where(b_rest > 0, (b_begin + b_rest - 1) // b_piece - b_first + 1, 0)
    b_before = tl.sum(tl.minimum(tl.maximum(i_l - b_first, 0), b_pieces))  # pieces of earlier lanes
    m_mine = (b_first <= i_l) & (i_l < b_first + b_pieces)  # [BT]
    b_rank = tl.cumsum(m_mine.to(tl.int32), axis=0) - 1
    b_start = tl.maximum(i_l * b_piece - b_begin, 0)
    b_end = tl.minimum((i_l + 1) * b_piece - b_begin, b_rest)
    m_whole = m_t & (o_t < b_rounds * num_lanes) & (o_t % num_lanes == i_l)
    b_work = i_l * b_rounds + b_before + tl.where(m_whole, o_t // num_lanes, b_rounds + b_rank)
    m_split = m_mine & (b_pieces > 1)
    b_slot = 2 * i_l + (b_first == i_l).to(tl.int32)
    m_work = m_mine | m_whole
    tl.store(work.query + b_work, o_t, mask=m_work)
    tl.store(work.list_begin + b_work, o_t * list_stride, mask=m_work)
    tl.store(work.partial_row + b_work, tl.where(m_split, b_slot * num_heads, -1), mask=m_work)
    tl.store(work.list_length + b_work, b_length, mask=m_work)
    tl.store(work.key_begin + b_work, tl.where(m_mine, b_start * TILE, 0), mask=m_work)
    b_end = tl.where(m_mine, tl.minimum(b_end * TILE, b_length), b_length)
    tl.store(work.key_end + b_work, b_end, mask=m_work)
    m_first = m_whole | (m_mine & (b_first == i_l))
    tl.store(work.first_lane + o_t, i_l + zero_like(o_t), mask=m_first)
    tl.store(work.num_pieces + o_t, tl.where(m_whole, 1, b_pieces), mask=m_first)
    b_lane_begin = i_l * b_rounds + b_before
    tl.store(work.lane_begin + i_l, b_lane_begin)
    if i_l == num_lanes - 1:
        b_mine = b_rounds + tl.sum(m_mine.to(tl.int32))
        tl.store(work.lane_begin + num_lanes, b_lane_begin + b_mine)


def mla_schedule(
    positions: torch.Tensor, kind: ListKind, list_stride: int, num_heads: int, work: WorkLists, split: bool = True
) -> None:
    """`naive_mla_schedule` in one launch; arguments as there.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: work.
    """
    check_contiguous("positions", positions)
    num_tokens = len(positions)
    if num_tokens == 0:
        work.lane_begin.zero_()
        return
    block = max(32, triton.next_power_of_2(num_tokens))
    mla_schedule_kernel[(work.num_lanes,)](
        p_positions=positions,
        num_tokens=num_tokens,
        list_stride=list_stride,
        num_heads=num_heads,
        work=work,
        num_lanes=work.num_lanes,
        WINDOW=kind.window,
        RATIO=kind.ratio,
        MOST=(1 << 40) if kind.most is None else kind.most,
        SPLIT=split,
        TILE=TILE_KEYS,
        SECOND=SECOND_WORK_TILES,
        MANY=MANY_ROUNDS,
        PIECE=PIECE_TILES,
        BT=block,
        num_warps=4 if block <= 1024 else 8,
    )
