"""Reference attention over row indices, with the sink."""

import torch

from dsv4_kernels.layout import RowFormat
from dsv4_kernels.row_codec.naive import naive_load_rows


def naive_sparse_attention(
    q: torch.Tensor, pool: torch.Tensor, pool_format: RowFormat, indices: torch.Tensor, sink: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each query token to the rows in its list; a row is both key and value.

    Equation:
        l_j = q . row_j * sm_scale;  out = sum_j exp(l_j - M) row_j / (sum_j exp(l_j - M) + exp(sink - M))      [ATTN-27]
        Source: report eq. 27; transformers' eager attention with sinks. M is the largest l_j.

    Args:
        q (torch.Tensor): ``[T, H, 512]``.
        pool (torch.Tensor): the layer's row pool.
        pool_format (RowFormat): its format.
        indices (torch.Tensor): ``[T, N]`` int64 pool rows; negative entries are ignored, and what the pool holds
            elsewhere is never used.
        sink (torch.Tensor): ``[H]`` logits that take weight but add no value; +-inf allowed.
        sm_scale (float): softmax scale.

    Returns:
        tuple: ``[T, H, 512]`` in ``q.dtype``, zeros for a token without rows; and the log-sum-exp of the logits without
        the sink, ``[T, H]`` fp32, -inf for a token without rows.
    """
    valid = indices >= 0  # [T, N]
    rows = naive_load_rows(pool, indices.clamp_min(0).flatten(), pool_format).view(*indices.shape, -1)  # [T, N, 512]
    rows = rows.masked_fill(~valid.unsqueeze(-1), 0.0)  # what an unused cell points at may be NaN
    logits = torch.einsum("thd,tnd->thn", q.float(), rows) * sm_scale
    logits = logits.masked_fill(~valid.unsqueeze(1), float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)  # [T, H]
    sink = sink.float()
    denominator = torch.logaddexp(lse, sink.expand_as(lse))
    empty = torch.isneginf(denominator).unsqueeze(-1)
    weights = torch.exp(logits - denominator.unsqueeze(-1).masked_fill(empty, 0.0))
    return torch.einsum("thn,tnd->thd", weights, rows).to(q.dtype), lse
