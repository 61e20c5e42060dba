"""Fused indexer: rotate queries, score the visible index keys, choose the best entries.

Three launches for a decode step or for as many tokens of a prefill as the workspace has rows, and a fourth where a token
may see more entries than one program can rank (`dsv4_kernels.index_topk`).

Scores are shared out as *tiles*: some entries times a *unit* of consecutive tokens, whose keys are loaded once for all
tokens of one request. The first launch also counts the tiles of every unit, so that each program of the second takes an
equal run of them whatever the lengths are, on a grid that depends on shapes alone. A score is one dot product per head over
all 128 channels, and a sum over heads in which every addition has two operands: it does not depend on what is around it.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

from dsv4_kernels.device import EXACT, check_contiguous, check_rows, hardware_casts
from dsv4_kernels.index_query.fused import COUNTED_UNITS, index_query, scored_entries
from dsv4_kernels.index_score.workspace import IndexWorkspace, held_scores, padded_heads
from dsv4_kernels.index_topk.fused import BLOCK, topk_entries
from dsv4_kernels.layout import INDEX_DIM, RowFormat
from dsv4_kernels.row_codec.fused import store_format
from dsv4_kernels.step import StepTensors


@triton.jit
def e4m3_values(b_byte, HARDWARE_CASTS: tl.constexpr):
    """Values of e4m3 bytes; each is a bf16 number."""
    if HARDWARE_CASTS:
        b_value = b_byte.to(tl.float8e4nv, bitcast=True).to(tl.bfloat16)
    else:
        b_bits = b_byte.to(tl.uint32)
        b_bits = ((b_bits & 0x80) << 24) | ((b_bits & 0x7F) << 20)
        # The exponent's bias is 7 in place of 127; e4m3's subnormals are fp32 subnormals before the product.
        b_value = b_bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return b_value


@triton.jit
def load_keys(p_pool, b_slot, m_s, FORMAT: tl.constexpr, D: tl.constexpr, CASTS: tl.constexpr):
    """Keys ``[BS, D]`` without their scales, and the scales ``[BS]``.

    A scale is a power of two: scores take it as well as keys, to the bit.
    """
    o_d = tl.arange(0, D)[None, :]
    if FORMAT.kind == "plain":
        b_key = tl.load(p_pool + b_slot[:, None] * D + o_d, mask=m_s[:, None], other=0.0)
        b_scale = tl.where(m_s, 1.0, 0.0)
    else:
        b_row = b_slot % FORMAT.group_rows
        p_group = p_pool + b_slot // FORMAT.group_rows * FORMAT.group_bytes
        p_key = p_group + b_row * FORMAT.data_bytes
        b_byte = tl.load(p_key[:, None] + o_d, mask=m_s[:, None], other=0)
        b_key = e4m3_values(b_byte, CASTS)
        p_scale = p_group + FORMAT.scale_offset + b_row * FORMAT.scale_bytes
        b_scale = tl.load(p_scale.to(tl.pointer_type(tl.float32)), mask=m_s, other=0.0)
    return b_key, b_scale


@triton.jit
def sum_heads(b_x, BS: tl.constexpr, H: tl.constexpr):
    """Sum ``[BS, H]`` to ``[BS]``; every addition has two operands, so no layout changes its result.

    Neighbours, then groups of eight by halves, then the rest of a group: the order in which a tensor core's tile has them in
    one thread as long as possible.
    """
    b_x = tl.sum(tl.reshape(b_x, [BS, H // 2, 2]), axis=2)
    for i in tl.static_range((H // 8).bit_length() - 1):
        b_x = tl.sum(tl.reshape(b_x, [BS, 2, H >> (i + 2)]), axis=1)
    b_x = tl.sum(tl.reshape(b_x, [BS, 2, 2]), axis=2)
    return tl.sum(b_x, axis=1)


@triton.jit
def unit_of(p_first_tiles, tile, num_units, BU: tl.constexpr):
    """The unit that a tile belongs to: as many come before it as end at or before the tile."""
    unit = num_units * 0
    for first in range(0, num_units, BU):
        o_u = first + tl.arange(0, BU)
        b_end = tl.load(p_first_tiles + 1 + o_u, mask=o_u < num_units, other=2147483647)
        unit += tl.sum((b_end <= tile).to(tl.int32), axis=0)
    return unit


@triton.jit
def load_query(
    p_query, p_weights, o_h, HEADS: tl.constexpr, D: tl.constexpr, OPERAND: tl.constexpr
):
    """One token's rotated queries ``[D, H]`` and its weights ``[H]``."""
    b_q = tl.load(p_query + o_h[None, :] * D + tl.arange(0, D)[:, None]).to(OPERAND)
    return b_q, tl.load(p_weights + o_h, mask=o_h < HEADS, other=0.0).to(tl.float32)


@triton.jit
def score_keys(
    b_key, b_scale, b_q, b_w, p_pool, b_slot, m_s, p_query, o_h,
    BS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Scores ``[BS]`` of keys for one token. fp32 operands do not fit the registers: ``BK`` channels are loaded at a time."""
    if BK == D:
        b_dot = tl.dot(b_key, b_q, input_precision="ieee")
    else:
        b_dot = tl.zeros([BS, H], tl.float32)
        for first in range(0, D, BK):
            o_d = first + tl.arange(0, BK)
            p_key = p_pool + b_slot[:, None] * D + o_d[None, :]
            b_part = tl.load(p_key, mask=m_s[:, None], other=0.0)
            b_q_part = tl.load(p_query + o_h[None, :] * D + o_d[:, None])
            b_dot = tl.dot(b_part, b_q_part, b_dot, input_precision="ieee")
    return sum_heads(tl.maximum(b_dot, 0.0) * b_w[None, :], BS, H) * b_scale


@triton.jit(do_not_specialize=["first_token", "num_tokens", "page_stride"])
def index_scores_kernel(
    p_positions, p_token_rows, p_pages, page_stride, first_token, num_tokens, p_first_tiles, p_query, p_weights,
    weight_stride, p_pool, p_scores, score_stride, HEADS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    RATIO: tl.constexpr, PER_PAGE: tl.constexpr, K: tl.constexpr, UNIT: tl.constexpr, BS: tl.constexpr,
    BK: tl.constexpr, BU: tl.constexpr, FORMAT: tl.constexpr, OPERAND: tl.constexpr, CASTS: tl.constexpr,
):  # fmt: skip
    """An equal share of the tiles per program."""
    num_units = tl.cdiv(num_tokens, UNIT)
    num_tiles = tl.load(p_first_tiles + num_units).to(tl.int64)
    tile = (num_tiles * tl.program_id(0) // tl.num_programs(0)).to(tl.int32)
    last_tile = (num_tiles * (tl.program_id(0) + 1) // tl.num_programs(0)).to(tl.int32)
    unit = num_tokens * 0
    if tile < last_tile:
        unit = unit_of(p_first_tiles, tile, num_units, BU)
    o_h = tl.arange(0, H)
    while tile < last_tile:
        first_tile = tl.load(p_first_tiles + unit)
        stop = tl.minimum(tl.load(p_first_tiles + unit + 1), last_tile)
        o_t = unit * UNIT + tl.arange(0, UNIT)
        b_visible = scored_entries(p_positions, first_token + o_t, o_t < num_tokens, RATIO, K)
        b_row = tl.load(p_token_rows + first_token + o_t, mask=o_t < num_tokens, other=-1)
        if UNIT == 1:
            visible = tl.sum(b_visible, axis=0)
            p_table = p_pages + tl.sum(b_row, axis=0) * page_stride
            wide_t = unit.to(tl.int64)
            p_q = p_query + wide_t * (H * D)
            b_q, b_w = load_query(
                p_q, p_weights + (first_token + wide_t) * weight_stride, o_h, HEADS, D, OPERAND
            )
            for number in range(tile - first_tile, stop - first_tile):
                o_s = number * BS + tl.arange(0, BS)
                m_s = o_s < visible
                b_page = tl.load(p_table + o_s // PER_PAGE, mask=m_s, other=0)
                b_slot = b_page * PER_PAGE + o_s % PER_PAGE
                b_key, b_scale = load_keys(p_pool, b_slot, m_s, FORMAT, D, CASTS)
                b_score = score_keys(
                    b_key.to(OPERAND),
                    b_scale,
                    b_q,
                    b_w,
                    p_pool,
                    b_slot,
                    m_s,
                    p_q,
                    o_h,
                    BS,
                    H,
                    D,
                    BK,
                )
                tl.store(p_scores + wide_t * score_stride + o_s, b_score, mask=m_s)
        else:
            for number in range(tile - first_tile, stop - first_tile):
                o_s = number * BS + tl.arange(0, BS)
                i_t = unit * UNIT
                end = tl.minimum(i_t + UNIT, num_tokens)
                while i_t < end:
                    # The tokens from here on that belong to the same request.
                    row = tl.sum(tl.where(o_t == i_t, b_row, 0), axis=0)
                    run_end = tl.min(tl.where((o_t > i_t) & (b_row != row), o_t, end), axis=0)
                    m_run = (o_t >= i_t) & (o_t < run_end)
                    most = tl.max(tl.where(m_run, b_visible, 0), axis=0)
                    m_s = o_s < most
                    if number * BS < most:
                        p_table = p_pages + row * page_stride
                        b_page = tl.load(p_table + o_s // PER_PAGE, mask=m_s, other=0)
                        b_slot = b_page * PER_PAGE + o_s % PER_PAGE
                        b_key, b_scale = load_keys(p_pool, b_slot, m_s, FORMAT, D, CASTS)
                        b_key = b_key.to(OPERAND)
                        for t in range(i_t, run_end):
                            visible = tl.sum(tl.where(o_t == t, b_visible, 0), axis=0)
                            wide_t = t + row * 0
                            p_q = p_query + wide_t * (H * D)
                            p_w = p_weights + (first_token + wide_t) * weight_stride
                            b_q, b_w = load_query(p_q, p_w, o_h, HEADS, D, OPERAND)
                            b_score = score_keys(
                                b_key,
                                b_scale,
                                b_q,
                                b_w,
                                p_pool,
                                b_slot,
                                m_s,
                                p_q,
                                o_h,
                                BS,
                                H,
                                D,
                                BK,
                            )
                            p_score = p_scores + wide_t * score_stride + o_s
                            tl.store(p_score, b_score, mask=o_s < visible)
                    i_t = run_end
        tile = stop
        unit += 1


class IndexTuning(NamedTuple):
    """Entries of a tile, tokens of a unit, warps, stages, and programs per multiprocessor.

    None changes a score, as long as a tile of rounded keys has at least 64 entries: a smaller one may be computed by another
    instruction of the tensor cores, which need not round alike.
    """

    entries: int
    unit: int
    warps: int
    stages: int
    occupancy: int


def index_tuning(num_tokens: int, num_requests: int, exact: bool) -> IndexTuning:
    """Tile of the scores, by shape: a decode step shares no keys and waits for memory, a prefill for tensor cores."""
    if exact:
        return IndexTuning(32, 1 if num_tokens <= num_requests else 16, 4, 1, 4)
    if num_tokens <= num_requests:
        return IndexTuning(64, 1, 4, 3, 4)
    return IndexTuning(128, 4 if num_tokens <= 8 * num_requests else 16, 4, 2, 4)


@cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def _programs(device: torch.device, occupancy: int) -> int:
    if device.type != "cuda":
        return 3
    index = torch.cuda.current_device() if device.index is None else device.index
    return _multiprocessors(index) * occupancy


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
    block: int = BLOCK,
    pad: bool = True,
    numbering: StepTensors | None = None,
) -> None:
    """`naive_select_entries`; arguments as there.

    Args:
        workspace (IndexWorkspace): of `index_workspace`, for the same heads, k and format.
        tuning (IndexTuning | None): of `index_tuning` if None.
        block (int): scores that one program ranks.
        pad (bool): write -1 behind the entries of a token that sees fewer than ``out`` has room for; else leave these cells.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: out, workspace.
    """
    num_tokens, scores = len(index_weights), held_scores(step, ratio, workspace)
    check_arguments(step, index_q, index_weights, index_pool, cos_sin, workspace)
    for first in range(0, num_tokens, len(scores)):
        count = min(len(scores), num_tokens - first)
        # Tables of so few pages leave nothing to choose.
        if scores.shape[1] > out.shape[1]:
            score_entries(
                step, index_q, index_weights, index_pool, key_format, cos_sin, ratio, out.shape[1], workspace, first,
                count, tuning,
            )  # fmt: skip
        listing = step if numbering is None else numbering
        topk_entries(listing, scores[:count], first, ratio, out, workspace.topk, block, pad)


def check_arguments(
    step: StepTensors, index_q: torch.Tensor, index_weights: torch.Tensor, index_pool: torch.Tensor,
    cos_sin: torch.Tensor, workspace: IndexWorkspace,
) -> None:  # fmt: skip
    """Raise `ValueError` unless shapes fit the workspace and kernels can address the tensors."""
    num_tokens, heads = index_weights.shape
    padded = padded_heads(heads)
    if tuple(index_q.shape) != (num_tokens, heads, INDEX_DIM):
        raise ValueError(
            f"index_q: expected ({num_tokens}, {heads}, {INDEX_DIM}), got {tuple(index_q.shape)}"
        )
    if workspace.query.shape[1] != padded:
        raise ValueError(
            f"workspace: expected {padded} padded heads, got {workspace.query.shape[1]}"
        )
    for name, tensor in (
        ("index_q", index_q),
        ("index_weights", index_weights),
        ("history_pages", step.history_pages),
    ):
        check_rows(name, tensor)
    for name, tensor in (
        ("index_pool", index_pool),
        ("cos_sin", cos_sin),
        ("positions", step.positions),
        ("token_rows", step.token_rows),
    ):
        check_contiguous(name, tensor)


def score_entries(
    step: StepTensors, index_q: torch.Tensor, index_weights: torch.Tensor, index_pool: torch.Tensor,
    key_format: RowFormat, cos_sin: torch.Tensor, ratio: int, k: int, workspace: IndexWorkspace, first_token: int,
    num_tokens: int, tuning: IndexTuning | None = None,
) -> None:  # fmt: skip
    """The first two launches of `select_entries`: rotate the queries of some tokens, and score their entries."""
    device, heads = index_q.device, index_q.shape[1]
    exact = key_format.storage_dtype == torch.float32
    if tuning is None:
        tuning = index_tuning(len(step.positions), len(step.seq_lens), exact)
    index_query(
        step, index_q, cos_sin, ratio, k, workspace.query, workspace.first_tiles, tuning.unit, tuning.entries, first_token,
        num_tokens,
    )  # fmt: skip
    scores = held_scores(step, ratio, workspace)
    most = triton.cdiv(num_tokens, tuning.unit) * triton.cdiv(scores.shape[1], tuning.entries)
    index_scores_kernel[(min(most, _programs(device, tuning.occupancy)),)](
        p_positions=step.positions,
        p_token_rows=step.token_rows,
        p_pages=step.history_pages,
        page_stride=step.history_pages.stride(0),
        first_token=first_token,
        num_tokens=num_tokens,
        p_first_tiles=workspace.first_tiles,
        p_query=workspace.query,
        p_weights=index_weights,
        weight_stride=index_weights.stride(0),
        p_pool=index_pool,
        p_scores=scores,
        score_stride=scores.stride(0),
        HEADS=heads,
        H=workspace.query.shape[1],
        D=INDEX_DIM,
        RATIO=ratio,
        PER_PAGE=step.page_tokens // ratio,
        K=k,
        UNIT=tuning.unit,
        BS=tuning.entries,
        BK=32 if exact else INDEX_DIM,
        BU=COUNTED_UNITS,
        FORMAT=store_format(key_format),
        # Triton's interpreter cannot multiply bf16.
        OPERAND=tl.float32 if exact or knobs.runtime.interpret else tl.bfloat16,
        CASTS=hardware_casts(device),
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        **EXACT,
    )
