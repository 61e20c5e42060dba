"""Reference flush of an HCA compressor."""

import torch

from dsv4_kernels.compressor.naive import finish_entries, naive_hca_finish, naive_hca_start, naive_hca_update
from dsv4_kernels.compressor.params import CompressorParams
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.row_codec.naive import naive_store_rows
from dsv4_kernels.step import StepTensors


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
    state = torch.where((offset > 0).view(-1, 1, 1), before, state)  # [N, 3, D]
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
        entries = finish_entries(naive_hca_finish(state[closed]), entry * ratio, params)
        naive_store_rows(pool, step.entry_slots(rows[closed], entry, ratio), entries, pool_format)
