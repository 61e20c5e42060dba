"""Reference flush of one CSA compressor.

A block that opens at a page boundary takes its previous block's b-stream from the *boundary state* of that block's
window page, every other block from the request's own stream rows. So nothing has to be restored when a request starts
at a page boundary after a prefix hit, and a request that starts anew never reads what another left in its state row.
"""

from dataclasses import dataclass

import torch

from dsv4_kernels.compressor.naive import finish_entries, naive_csa_pool
from dsv4_kernels.compressor.params import CompressorParams
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.row_codec.naive import naive_store_rows
from dsv4_kernels.step import StepTensors
from dsv4_kernels.streams import csa_parts, csa_streams


@dataclass(frozen=True)
class CsaFlush:
    """Arguments of `naive_flush_csa` for one compressor, without the step."""

    kv_score: torch.Tensor
    streams: torch.Tensor
    boundary: torch.Tensor
    pool: torch.Tensor
    pool_format: RowFormat
    params: CompressorParams


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
    raw = naive_csa_pool(kv, gate + params.slot_bias, first > 0)  # [N, D]
    entries = finish_entries(raw, first, params)
    slots_of = step.index_slots if params.rotate else step.entry_slots
    naive_store_rows(pool, slots_of(rows, first // ratio, ratio), entries, pool_format)
