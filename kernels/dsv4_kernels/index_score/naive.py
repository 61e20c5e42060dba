"""Reference indexer: scores and top-k."""

import torch

from dsv4_kernels.hadamard.naive import naive_hadamard
from dsv4_kernels.layout import BF16_INDEX, FP8_INDEX, FP32_INDEX, RowFormat
from dsv4_kernels.norm_rope.naive import naive_rope
from dsv4_kernels.row_codec.naive import naive_load_rows, naive_quantize_e4m3
from dsv4_kernels.step import StepTensors


def naive_round_query(q: torch.Tensor, key_format: RowFormat) -> torch.Tensor:
    """Round rotated index queries as keys of this format are, one scale a head where keys have one.

    Args:
        q (torch.Tensor): ``[..., 128]``, fp32.
        key_format (RowFormat): of the keys that they meet.

    Returns:
        torch.Tensor: the rounded values, fp32.
    """
    if key_format is FP8_INDEX:
        values, exponent = naive_quantize_e4m3(q)
        return torch.ldexp(values.float(), exponent.unsqueeze(-1))
    return q.bfloat16().float() if key_format is BF16_INDEX else q


def naive_index_query(q: torch.Tensor, cos_sin: torch.Tensor, key_format: RowFormat = FP32_INDEX) -> torch.Tensor:
    """Rotate index queries as the index keys were, and round them alike.

    Equation: q' = ROUND(HADAMARD(ROPE_t(q)))      [INDEX-Q]

    Args:
        q (torch.Tensor): ``[T, heads, 128]``, the projection.
        cos_sin (torch.Tensor): ``[T, 64]``, fp32, the table's rows at the tokens' positions.
        key_format (RowFormat): of the keys, see `naive_round_query`.

    Returns:
        torch.Tensor: ``[T, heads, 128]``, fp32.
    """
    return naive_round_query(naive_hadamard(naive_rope(q, cos_sin)), key_format)


def naive_index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Score every key for every query token.

    Equation:
        I[t, s] = sum_h w[t, h] ReLU(q[t, h] . k[s])      [INDEX-16]
        Source: report eq. 16; transformers DeepseekV4Indexer.

    Args:
        q (torch.Tensor): ``[T, heads, 128]``, fp32, from `naive_index_query`.
        weights (torch.Tensor): ``[T, heads]``, the scales ``128^-1/2 heads^-1/2`` included.
        keys (torch.Tensor): ``[S, 128]``, fp32.

    Returns:
        torch.Tensor: ``[T, S]``, fp32.
    """
    dots = torch.relu(torch.einsum("thd,sd->ths", q, keys))  # [T, heads, S]
    return torch.einsum("ths,th->ts", dots, weights.float())


def naive_topk_entries(scores: torch.Tensor, num_visible: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` best visible entries of each row, ties to the lowest index.

    Args:
        scores (torch.Tensor): ``[T, S]``, fp32; columns past a row's visible ones may hold anything.
        num_visible (torch.Tensor): ``[T]`` int64, entries ``0 .. num_visible-1`` may be chosen.
        k (int): entries per row, > 0.

    Returns:
        torch.Tensor: ``[T, min(k, S)]`` int64, ascending, -1 past the chosen ones.
    """
    num_entries = scores.shape[1]
    entry = torch.arange(num_entries, device=scores.device)
    hidden = entry >= num_visible.unsqueeze(1)
    scores = scores.masked_fill(hidden, float("-inf"))
    # A stable descending sort keeps equal scores in index order.
    chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = chosen.masked_fill(chosen >= num_visible.unsqueeze(1), num_entries).sort(dim=1).values
    return chosen.masked_fill(chosen == num_entries, -1)


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
        scores = naive_index_scores(q, index_weights[tokens], keys)
        chosen = naive_topk_entries(scores, visible[tokens], out.shape[1])
        rows = listing.entry_slots(torch.full_like(chosen, row), chosen.clamp_min(0), ratio)
        out[tokens, : chosen.shape[1]] = rows.masked_fill(chosen < 0, -1).to(out.dtype)
