"""Fused scores of the visible index keys, and the maxima of each eight.

Scores are shared out as *tiles*: some entries times a *unit* of consecutive tokens, whose keys are loaded once for all
tokens of one request. The launch that rotates queries also counts the tiles of every unit, so that each program of this one
takes an equal run of them whatever the lengths are, on a grid that depends on shapes alone. A score is one dot product per head over
all 128 channels, and a sum over heads in which every addition has two operands: it does not depend on what is around it.

Where keys are e4m3, so are queries, and tensor cores that multiply e4m3 do; the others get bf16, which holds every such
number. Powers of two, the scales of keys and of queries, are applied to sums.
"""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import EXACT, hardware_casts, is_interpreting, zero_like
from dsv4_kernels.index_query.fused import COUNTED_UNITS, scored_entries
from dsv4_kernels.index_score.tuning import IndexTuning, num_programs, rows_together
from dsv4_kernels.index_score.workspace import IndexWorkspace, held_scores
from dsv4_kernels.index_topk.tuning import GROUP
from dsv4_kernels.layout import FP8_INDEX, INDEX_DIM, RowFormat
from dsv4_kernels.row_codec.fused import e4m3_to_fp32, store_format
from dsv4_kernels.step import StepTensors


@triton.jit
def first_slots(p_table, number, most, PER_PAGE: tl.constexpr, BS: tl.constexpr, PART: tl.constexpr):
    """Slots at which the two halves of a tile begin, or the whole twice, where rows of a part lie together."""
    first = number * BS
    slot = tl.load(p_table + first // PER_PAGE) * PER_PAGE + first % PER_PAGE
    if PART == BS:
        second = slot
    else:
        first += PART
        # A page that the tile reaches past the last entry need not be there.
        page = tl.load(p_table + first // PER_PAGE, mask=first < most, other=0)
        second = page * PER_PAGE + first % PER_PAGE
    return slot, second


@triton.jit
def load_keys(
    p_pool, slot, second, first, FORMAT: tl.constexpr, BS: tl.constexpr, PART: tl.constexpr, BK: tl.constexpr, D: tl.constexpr
):
    """Channels ``first .. first+BK-1`` of keys as they are stored, ``[BS, BK]``, and the keys' scales ``[BS]``.

    Rows of each half lie together, so that addresses are one number and an offset. They are read without a mask: a page has all
    its rows, and scores of those that no token sees are not stored.
    """
    o_d = first + tl.arange(0, BK)[None, :]
    o_r = tl.arange(0, BS) % PART  # [BS]
    m_first = tl.arange(0, BS) < PART
    b_scale = tl.full([BS], 1.0, tl.float32)
    if FORMAT.kind == "plain":
        b_offset = slot * D
        if PART < BS:
            b_offset = tl.where(m_first, b_offset, second * D)[:, None]
        b_key = tl.load(p_pool + b_offset + (o_r[:, None] * D + o_d))
    else:
        group, row = slot // FORMAT.group_rows, slot % FORMAT.group_rows
        b_data = group * FORMAT.group_bytes + row * FORMAT.data_bytes
        b_scales = group * FORMAT.group_bytes + FORMAT.scale_offset + row * FORMAT.scale_bytes
        if PART == BS:
            b_key = tl.load(p_pool + b_data + (o_r[:, None] * FORMAT.data_bytes + o_d))
            p_scale = (p_pool + b_scales).to(tl.pointer_type(tl.float32)) + o_r
        else:
            group, row = second // FORMAT.group_rows, second % FORMAT.group_rows
            b_more = group * FORMAT.group_bytes + row * FORMAT.data_bytes
            b_data = tl.where(m_first, b_data, b_more)
            b_more = group * FORMAT.group_bytes + FORMAT.scale_offset + row * FORMAT.scale_bytes
            b_scales = tl.where(m_first, b_scales, b_more)
            b_key = tl.load(p_pool + b_data[:, None] + (o_r[:, None] * FORMAT.data_bytes + o_d))
            p_scale = (p_pool + b_scales).to(tl.pointer_type(tl.float32)) + o_r
        b_scale = tl.load(p_scale)
    return b_key, b_scale


@triton.jit
def as_operand(b_x, OPERAND: tl.constexpr, CASTS: tl.constexpr):
    """Stored keys or queries as a tensor core takes them; none of the casts rounds."""
    if b_x.dtype == tl.uint8:
        if tl.float8e4nv == OPERAND:
            b_operand = b_x.to(tl.float8e4nv, bitcast=True)
        else:
            b_operand = e4m3_to_fp32(b_x, CASTS).to(OPERAND)
    else:
        b_operand = b_x.to(OPERAND)
    return b_operand


@triton.jit
def quarters(b_x, BS: tl.constexpr, UNIT: tl.constexpr, H: tl.constexpr):
    """The first, second, third and last quarter of the heads of ``[BS, UNIT * H]``, each ``[BS, UNIT, H / 4]``."""
    b_x = tl.permute(tl.reshape(b_x, [BS, UNIT, 2, 2, H // 4]), (0, 1, 4, 2, 3))
    b_even, b_odd = tl.split(b_x)  # of the quarters
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    return b_0, b_1, b_2, b_3


@triton.jit
def sum_heads(b_dot, b_w, BS: tl.constexpr, UNIT: tl.constexpr, H: tl.constexpr):
    """Sum ``max(dot, 0) * weight`` over the heads of ``[BS, UNIT * H]``, to ``[BS, UNIT]``.

    Quarters are added up by explicit fused products; every addition after that has two operands: so no layout and no other
    code around it changes the result. Neighbours, then groups of eight by halves, then the rest of a group: the order in which
    a tensor core's tile has them in one thread as long as possible.
    """
    b_0, b_1, b_2, b_3 = quarters(tl.maximum(b_dot, 0.0), BS, UNIT, H)
    b_w_0, b_w_1, b_w_2, b_w_3 = quarters(b_w[None, :], 1, UNIT, H)
    b_x = tl.fma(b_3, b_w_3, tl.fma(b_2, b_w_2, tl.fma(b_1, b_w_1, b_0 * b_w_0)))
    Q: tl.constexpr = H // 4
    b_x = tl.sum(tl.reshape(b_x, [BS, UNIT, Q // 2, 2]), axis=3)
    for i in tl.static_range((Q // 8).bit_length() - 1):
        b_x = tl.sum(tl.reshape(b_x, [BS, UNIT, 2, Q >> (i + 2)]), axis=2)
    if Q > 4:
        b_x = tl.sum(tl.reshape(b_x, [BS, UNIT, 2, 2]), axis=3)
    return tl.sum(b_x, axis=2)


@triton.jit
def unit_of(p_first_tiles, tile, num_units, BU: tl.constexpr):
    """The unit that a tile belongs to: as many come before it as end at or before the tile."""
    unit = zero_like(num_units)
    for first in range(0, num_units, BU):
        o_u = first + tl.arange(0, BU)
        b_end = tl.load(p_first_tiles + 1 + o_u, mask=o_u < num_units, other=2147483647)
        unit += tl.sum((b_end <= tile).to(tl.int32), axis=0)
    return unit


@triton.jit
def load_query(p_query, o_n, m_n, first, D: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr, CASTS: tl.constexpr):
    """Channels of a unit's queries, one head of one token each, ``[BK, UNIT * H]``."""
    o_d = first + tl.arange(0, BK)
    b_q = tl.load(p_query + o_n[None, :] * D + o_d[:, None], mask=m_n[None, :], other=0)
    return as_operand(b_q, OPERAND, CASTS)


@triton.jit(do_not_specialize=["first_token", "num_tokens", "page_stride"])
def index_scores_kernel(
    p_positions,
    p_token_rows,
    p_pages,
    page_stride,
    first_token,
    num_tokens,
    p_first_tiles,
    p_query,
    p_weights,
    p_pool,
    p_scores,
    score_stride,
    p_maxima,
    maxima_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    RATIO: tl.constexpr,
    PER_PAGE: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    BS: tl.constexpr,
    PART: tl.constexpr,
    BK: tl.constexpr,
    BU: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    OPERAND: tl.constexpr,
    CASTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """An equal share of the tiles per program."""
    num_units = tl.cdiv(num_tokens, UNIT)
    num_tiles = tl.load(p_first_tiles + num_units).to(tl.int64)
    tile = (num_tiles * tl.program_id(0) // tl.num_programs(0)).to(tl.int32)
    last_tile = (num_tiles * (tl.program_id(0) + 1) // tl.num_programs(0)).to(tl.int32)
    unit = zero_like(num_tokens)
    if tile < last_tile:
        unit = unit_of(p_first_tiles, tile, num_units, BU)
    o_u = tl.arange(0, UNIT)
    while tile < last_tile:
        first_tile = tl.load(p_first_tiles + unit)
        stop = tl.minimum(tl.load(p_first_tiles + unit + 1), last_tile)
        o_t = unit * UNIT + o_u
        b_visible = scored_entries(p_positions, first_token + o_t, o_t < num_tokens, RATIO, K)  # [UNIT]
        b_row = tl.load(p_token_rows + first_token + o_t, mask=o_t < num_tokens, other=-1)
        o_n = unit.to(tl.int64) * (UNIT * H) + tl.arange(0, UNIT * H)
        m_n = o_n < num_tokens.to(tl.int64) * H
        b_w = tl.load(p_weights + o_n, mask=m_n, other=0.0)
        b_q = load_query(p_query, o_n, m_n, 0, D, BK, OPERAND, CASTS)  # [BK, UNIT H]
        i_t = unit * UNIT
        end = tl.minimum(i_t + UNIT, num_tokens)
        while i_t < end:
            # The tokens from here on that belong to the same request.
            row = tl.sum(tl.where(o_t == i_t, b_row, 0), axis=0)
            run_end = tl.min(tl.where((o_t > i_t) & (b_row != row), o_t, end), axis=0)
            b_seen = tl.where((o_t >= i_t) & (o_t < run_end), b_visible, 0)
            most = tl.max(b_seen, axis=0)
            p_table = p_pages + row * page_stride
            p_score = p_scores + o_t.to(tl.int64) * score_stride
            p_maximum = p_maxima + o_t.to(tl.int64) * maxima_stride
            run_stop = tl.minimum(stop - first_tile, tl.cdiv(most, BS))
            for number in tl.range(tile - first_tile, run_stop, num_stages=STAGES):
                o_s = number * BS + tl.arange(0, BS)
                slot, second = first_slots(p_table, number, most, PER_PAGE, BS, PART)
                b_key, b_scale = load_keys(p_pool, slot, second, 0, FORMAT, BS, PART, BK, D)
                b_dot = tl.dot(as_operand(b_key, OPERAND, CASTS), b_q, input_precision="ieee")  # [BS, UNIT H]
                # fp32 operands do not fit the registers: BK channels at a time.
                for first in tl.static_range(BK, D, BK):
                    b_part, b_scale = load_keys(p_pool, slot, second, first, FORMAT, BS, PART, BK, D)
                    b_q_part = load_query(p_query, o_n, m_n, first, D, BK, OPERAND, CASTS)
                    b_dot = tl.dot(b_part, b_q_part, b_dot, input_precision="ieee")
                b_score = sum_heads(b_dot, b_w, BS, UNIT, H) * b_scale[:, None]  # [BS, UNIT]
                m_seen = o_s[:, None] < b_seen[None, :]
                tl.store(p_score[None, :] + o_s[:, None], b_score, mask=m_seen)
                b_best = tl.where(m_seen, b_score, float("-inf"))
                b_best = tl.max(tl.reshape(b_best, [BS // GROUP, GROUP, UNIT]), axis=1)  # [BS / GROUP, UNIT]
                o_g = number * (BS // GROUP) + tl.arange(0, BS // GROUP)
                m_g = o_g[:, None] * GROUP < b_seen[None, :]
                tl.store(p_maximum[None, :] + o_g[:, None], b_best, mask=m_g)
            i_t = run_end
        tile = stop
        unit += 1


def operand(key_format: RowFormat, device: torch.device) -> tl.dtype:
    """What tensor cores multiply: e4m3 where they can, fp32 where keys are exact, else bf16."""
    if key_format.storage_dtype == torch.float32 or is_interpreting():
        return tl.float32  # Triton's interpreter cannot multiply bf16.
    return tl.float8e4nv if key_format is FP8_INDEX and hardware_casts(device) else tl.bfloat16


def score_entries(
    step: StepTensors,
    index_pool: torch.Tensor,
    key_format: RowFormat,
    ratio: int,
    k: int,
    workspace: IndexWorkspace,
    tuning: IndexTuning,
    first_token: int,
    num_tokens: int,
) -> None:
    """`naive_index_scores` of some tokens that see more than ``k`` entries, whose queries `index_query` has just rounded.

    Args:
        step (StepTensors): the step.
        index_pool (torch.Tensor): index keys at `StepTensors.index_slots`.
        key_format (RowFormat): the pool's format.
        ratio (int): tokens per entry.
        k (int): entries to choose; a token that sees no more is skipped.
        workspace (IndexWorkspace): queries, weights and first tiles are read; `held_scores` of it are written.
        tuning (IndexTuning): as `index_query` numbered the tiles.
        first_token (int): the first of these tokens.
        num_tokens (int): their number.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: workspace.
    """
    device, query = index_pool.device, workspace.stored_query
    exact = key_format.storage_dtype == torch.float32
    scores, maxima = held_scores(step, ratio, workspace)
    per_page = step.page_tokens // ratio
    part = rows_together(per_page, key_format, tuning.entries)
    most = triton.cdiv(num_tokens, tuning.unit) * triton.cdiv(scores.shape[1], tuning.entries)
    index_scores_kernel[(min(most, num_programs(device, tuning.occupancy)),)](
        p_positions=step.positions,
        p_token_rows=step.token_rows,
        p_pages=step.history_pages,
        page_stride=step.history_pages.stride(0),
        first_token=first_token,
        num_tokens=num_tokens,
        p_first_tiles=workspace.first_tiles,
        p_query=query,
        p_weights=workspace.weights,
        p_pool=index_pool,
        p_scores=scores,
        score_stride=scores.stride(0),
        p_maxima=maxima,
        maxima_stride=maxima.stride(0),
        H=query.shape[1],
        D=INDEX_DIM,
        RATIO=ratio,
        PER_PAGE=per_page,
        K=k,
        UNIT=tuning.unit,
        BS=tuning.entries,
        PART=part,
        BK=32 if exact else INDEX_DIM,
        BU=COUNTED_UNITS,
        GROUP=GROUP,
        FORMAT=store_format(key_format),
        OPERAND=operand(key_format, device),
        CASTS=hardware_casts(device),
        STAGES=tuning.stages,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        maxnreg=tuning.registers,
        **EXACT,
    )
