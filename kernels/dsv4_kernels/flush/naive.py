"""Reference flush of one compressor.

A block that opens at a page boundary takes its previous block's b-stream from the *boundary state* of that block's
window page, every other block from the request's own stream rows. So nothing has to be restored when a request starts
at a page boundary after a prefix hit, and a request that starts anew never reads what another left in its state row.
"""

from dataclasses import dataclass

import torch

from dsv4_kernels.compress.naive import naive_csa_pool, naive_hca_finish, naive_hca_start, naive_hca_update
from dsv4_kernels.hadamard.naive import naive_hadamard
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.norm_rope.naive import naive_rms_norm, naive_rope
from dsv4_kernels.row_codec.naive import naive_store_rows
from dsv4_kernels.step import StepTensors
from dsv4_kernels.streams import csa_parts, csa_streams


@dataclass(frozen=True)
class CompressorParams:
    """Weights and constants of one compressor.

    Attributes:
        slot_bias (torch.Tensor): ``[2*m, D]`` (CSA) or ``[m, D]`` (HCA), fp32, from `dsv4_kernels.streams.slot_bias`.
        norm_weight (torch.Tensor): ``[D]``.
        eps (float): RMSNorm epsilon.
        cos_sin (torch.Tensor): ``[P, R]``, fp32, from `dsv4_kernels.norm_rope.rope_table`.
        rotate (bool): Hadamard-rotate the entries (index keys).
    """

    slot_bias: torch.Tensor
    norm_weight: torch.Tensor
    eps: float
    cos_sin: torch.Tensor
    rotate: bool = False


@dataclass(frozen=True)
class CsaFlush:
    """Arguments of `naive_flush_csa` for one compressor, without the step."""

    kv_score: torch.Tensor
    streams: torch.Tensor
    boundary: torch.Tensor
    pool: torch.Tensor
    pool_format: RowFormat
    params: CompressorParams


def _finish_entries(raw: torch.Tensor, first_positions: torch.Tensor, params: CompressorParams) -> torch.Tensor:
    """Norm, RoPE at the block's first position, and for index keys the rotation: ``[N, D]`` fp32."""
    entries = naive_rope(naive_rms_norm(raw, params.norm_weight, params.eps), params.cos_sin[first_positions])
    return naive_hadamard(entries) if params.rotate else entries


def _block_rows(
    step: StepTensors, kv_score: torch.Tensor, streams: torch.Tensor, closing: torch.Tensor, ratio: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each closing block pools: the b-stream of the block before it, then its own a-stream.

    Rows are this step's input, or the stream rows of tokens before it.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: kv and gate, ``[N, 2*m, D]`` fp32 each.
    """
    age = torch.arange(2 * ratio - 1, -1, -1, device=kv_score.device)  # [2m], tokens before the last
    part = (age < ratio).to(torch.int64)  # [2m], 0: b-stream, 1: a-stream
    rows = step.token_rows[closing].unsqueeze(1)  # [N, 1]
    positions = step.positions[closing].unsqueeze(1) - age  # [N, 2m]
    token = (closing.unsqueeze(1) - age).clamp_min(0)
    old = torch.nonzero(positions < (step.seq_lens - step.extend_lens)[rows]).unbind(1)
    slots = step.state_slots[rows.flatten()[old[0]]]
    ring_rows = positions[old].clamp_min(0) % streams.shape[1]
    found = csa_streams(kv_score)[token, :, part].float()  # [N, 2m, 2, D]
    found[old] = csa_streams(streams)[slots, ring_rows, :, part[old[1]]]
    kv, gate = found.unbind(2)
    return kv, gate


def naive_flush_csa(
    step: StepTensors,
    kv_score: torch.Tensor,
    streams: torch.Tensor,
    boundary: torch.Tensor,
    pool: torch.Tensor,
    pool_format: RowFormat,
    params: CompressorParams,
) -> None:
    """Pool and store the CSA blocks that this step closes, and keep the rows that later blocks need.

    Equation: [CSA-9..12] of `naive_csa_pool`, [NORM], [ROPE] at position ``m*i``, [HADAMARD] for index keys.

    Args:
        step (StepTensors): the step.
        kv_score (torch.Tensor): ``[T, 4*D]``, fp32 or bf16: kv_b, kv_a, gate_b, gate_a.
        streams (torch.Tensor): ``[S, ring, 4*D]``, fp32, ``ring >= 2*m``: row ``position % ring`` of each state slot.
            Written.
        boundary (torch.Tensor): ``[window pages, m, 2, D]``, fp32: kv_b and gate_b of each page's last block. Written.
        pool (torch.Tensor): entries go to `StepTensors.entry_slots`, index keys (``params.rotate``) to
            `StepTensors.index_slots`. Written.
        pool_format (RowFormat): the pool's format.
        params (CompressorParams): the compressor.
    """
    ratio = boundary.shape[1]
    kv_b, _, gate_b, _ = csa_parts(kv_score, params.norm_weight.shape[0])
    at_boundary = torch.nonzero(step.positions % step.page_tokens >= step.page_tokens - ratio).flatten()
    page = step.window_pages[step.token_rows[at_boundary], step.positions[at_boundary] // step.page_tokens]
    offset = step.positions[at_boundary] % ratio
    # Before pooling: the last block of a page may come half from an earlier step, and the next block close in this one.
    boundary[page, offset] = torch.stack([kv_b[at_boundary], gate_b[at_boundary]], dim=1).float()
    closing = torch.nonzero((step.positions + 1) % ratio == 0).flatten()
    if len(closing):
        _store_csa_entries(step, kv_score, streams, boundary, pool, pool_format, params, closing)
    ring = streams.shape[1]
    survivors = torch.nonzero(step.positions >= step.seq_lens[step.token_rows] - ring).flatten()
    slots = step.state_slots[step.token_rows[survivors]]
    streams[slots, step.positions[survivors] % ring] = kv_score[survivors].float()


def _store_csa_entries(
    step: StepTensors,
    kv_score: torch.Tensor,
    streams: torch.Tensor,
    boundary: torch.Tensor,
    pool: torch.Tensor,
    pool_format: RowFormat,
    params: CompressorParams,
    closing: torch.Tensor,
) -> None:
    ratio = boundary.shape[1]
    rows, first = step.token_rows[closing], step.positions[closing] + 1 - ratio
    kv, gate = _block_rows(step, kv_score, streams, closing, ratio)
    after_page = torch.nonzero((first > 0) & (first % step.page_tokens == 0)).flatten()
    page = step.window_pages[rows[after_page], first[after_page] // step.page_tokens - 1]
    kv[after_page, :ratio], gate[after_page, :ratio] = boundary[page].unbind(dim=2)
    raw = naive_csa_pool(kv, gate + params.slot_bias, first > 0)
    entries = _finish_entries(raw, first, params)
    slots_of = step.index_slots if params.rotate else step.entry_slots
    naive_store_rows(pool, slots_of(rows, first // ratio, ratio), entries, pool_format)


def naive_flush_hca(
    step: StepTensors,
    kv_score: torch.Tensor,
    accumulators: torch.Tensor,
    pool: torch.Tensor,
    pool_format: RowFormat,
    params: CompressorParams,
) -> None:
    """Take this step's tokens into the HCA accumulators, and store the entries of the blocks that close.

    Equation: [HCA-20..23] of `naive_hca_update`, [NORM], [ROPE] at position ``m*i``.

    Args:
        step (StepTensors): the step.
        kv_score (torch.Tensor): ``[T, 2*D]``, fp32 or bf16: kv, gate.
        accumulators (torch.Tensor): ``[S, ring, 3, D]``, fp32, ``ring >= 1``: row ``position % ring`` of a state slot is the
            maximum, sum and weighted sum of that position's block up to and with that position. Written for the last
            ``ring`` tokens; never read for a block that starts in this step.
        pool (torch.Tensor): entries go to `StepTensors.entry_slots`. Written.
        pool_format (RowFormat): the pool's format.
        params (CompressorParams): the compressor.
    """
    (ratio, dim), ring = params.slot_bias.shape, accumulators.shape[1]
    block = step.positions // ratio
    starts = torch.ones_like(block, dtype=torch.bool)
    starts[1:] = (block[1:] != block[:-1]) | (step.token_rows[1:] != step.token_rows[:-1])
    first_token = torch.nonzero(starts).flatten()  # [N]: first new token of each block this step touches
    num_tokens = torch.diff(first_token, append=first_token.new_tensor([len(block)]))
    rows, first = step.token_rows[first_token], step.positions[first_token]
    offset, slots = first % ratio, step.state_slots[rows]
    state = naive_hca_start(len(first_token), dim, kv_score.device)
    before = accumulators[slots, (first - 1).clamp_min(0) % ring]
    state = torch.where((offset > 0).view(-1, 1, 1), before, state)
    kv, gate = kv_score.float().split(dim, dim=-1)
    gate = gate + params.slot_bias[step.positions % ratio]
    is_kept = step.positions >= (step.seq_lens - ring)[step.token_rows]
    for j in range(int(num_tokens.max()) if len(first_token) else 0):
        live = torch.nonzero(num_tokens > j).flatten()
        token = first_token[live] + j
        state[live] = naive_hca_update(state[live], kv[token], gate[token])
        kept = live[is_kept[token]]
        accumulators[slots[kept], (first[kept] + j) % ring] = state[kept]
    closed = torch.nonzero(offset + num_tokens == ratio).flatten()
    if len(closed):
        entry = block[first_token[closed]]
        entries = _finish_entries(naive_hca_finish(state[closed]), entry * ratio, params)
        naive_store_rows(pool, step.entry_slots(rows[closed], entry, ratio), entries, pool_format)
