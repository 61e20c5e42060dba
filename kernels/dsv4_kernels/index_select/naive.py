"""Reference choice of entries, from queries and index keys to rows."""

import torch

from dsv4_kernels.index_query.naive import naive_index_query
from dsv4_kernels.index_score.naive import naive_index_scores
from dsv4_kernels.index_topk.naive import naive_topk_entries
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.row_codec.naive import naive_load_rows
from dsv4_kernels.step import StepTensors


def naive_select_entries(
    step: StepTensors,
    index_q: torch.Tensor,
    index_weights: torch.Tensor,
    index_pool: torch.Tensor,
    key_format: RowFormat,
    cos_sin: torch.Tensor,
    ratio: int,
    out: torch.Tensor,
    numbering: StepTensors | None = None,
) -> None:
    """Choose each new token's best entries among those it sees, and list their rows.

    Equation: top-k of I[t, s] over ``s < (t + 1) // ratio``; [INDEX-Q], [INDEX-16]; ties to the lowest ``s``.

    Args:
        step (StepTensors): the step; a token of position -1 is padding, and sees nothing.
        index_q (torch.Tensor): ``[T, heads, 128]``, fp32 or bf16, before RoPE.
        index_weights (torch.Tensor): ``[T, heads]``, fp32 or bf16, the scales included.
        index_pool (torch.Tensor): index keys at `StepTensors.index_slots`.
        key_format (RowFormat): the pool's format.
        cos_sin (torch.Tensor): ``[P, 64]``, fp32, from `dsv4_kernels.norm_rope.rope_table`.
        ratio (int): tokens per entry.
        out (torch.Tensor): ``[T, k]`` int32, row-pool rows (`StepTensors.entry_slots`) in the entries' order, then -1.
            Written.
        numbering (StepTensors | None): the same requests' step over other tables, by which the chosen entries' rows are
            numbered; keys are read by ``step``'s. None: ``step``'s too.
    """
    listing = step if numbering is None else numbering
    visible = (step.positions + 1) // ratio
    out.fill_(-1)
    for row in step.token_rows.unique().tolist():
        tokens = torch.nonzero((step.token_rows == row) & (visible > 0)).flatten()
        if len(tokens) == 0:
            continue
        entries = torch.arange(int(visible[tokens].max()), device=out.device)
        slots = step.index_slots(torch.full_like(entries, row), entries, ratio)
        keys = naive_load_rows(index_pool, slots, key_format)
        cos_sin_rows = cos_sin[step.positions[tokens]]
        q = naive_index_query(index_q[tokens], cos_sin_rows, key_format)
        scores = naive_index_scores(q, index_weights[tokens], keys)  # [tokens, entries]
        chosen = naive_topk_entries(scores, visible[tokens], out.shape[1])
        rows = listing.entry_slots(torch.full_like(chosen, row), chosen.clamp_min(0), ratio)
        out[tokens, : chosen.shape[1]] = rows.masked_fill(chosen < 0, -1).to(out.dtype)
