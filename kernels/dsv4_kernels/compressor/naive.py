"""Reference pooling and the end of every entry, in one fixed order that no chunking can change.

Both poolings are per channel. CSA holds its eight rows at once: one maximum, then eight additions in slot order. HCA
holds an accumulator and takes tokens one by one: prefill and decode run the same recurrence.
"""

import torch

from dsv4_kernels.compressor.params import CompressorParams
from dsv4_kernels.hadamard.naive import naive_hadamard
from dsv4_kernels.norm_rope.naive import naive_rms_norm, naive_rope

# Maximum of an accumulator without tokens. It is finite: from -inf on, a first gate of -inf, which has no weight, would make
# NaN. Any gate that has weight comes first: exp(LOWEST - gate) is 0 for every greater number.
LOWEST = torch.finfo(torch.float32).min


def naive_csa_pool(kv: torch.Tensor, gate: torch.Tensor, has_previous: torch.Tensor) -> torch.Tensor:
    """Pool the previous block's b-stream and the own block's a-stream, one softmax over both.

    Equation:
        w_j = exp(gate_j - max_j gate_j);  C[d] = sum_j w_j[d] kv_j[d] / sum_j w_j[d]      [CSA-9..12]
        Source: report eqs. 9-12; transformers DeepseekV4CSACompressor.

    Args:
        kv (torch.Tensor): ``[N, 2*m, D]``, fp32; slots ``0..m-1`` are the previous block's b-stream, ``m..2*m-1`` the own
            block's a-stream.
        gate (torch.Tensor): ``[N, 2*m, D]``, fp32, position bias added.
        has_previous (torch.Tensor): ``[N]`` bool; False for block 0, whose first m slots are never read.

    Returns:
        torch.Tensor: ``[N, D]``, fp32.
    """
    num_slots = kv.shape[1]
    absent = torch.zeros_like(gate, dtype=torch.bool)
    absent[:, : num_slots // 2] = ~has_previous.view(-1, 1, 1)
    gate = gate.masked_fill(absent, float("-inf"))
    kv = kv.masked_fill(absent, 0.0)
    weight = torch.exp(gate - gate.amax(dim=1, keepdim=True))  # [N, 2m, D]
    total, pooled = weight[:, 0], weight[:, 0] * kv[:, 0]
    for slot in range(1, num_slots):
        total = total + weight[:, slot]
        pooled = pooled + weight[:, slot] * kv[:, slot]
    return pooled / total


def naive_hca_start(num_blocks: int, dim: int, device: torch.device) -> torch.Tensor:
    """Accumulators of blocks without tokens: ``[N, 3, D]`` fp32, (maximum `LOWEST`, sum 0, weighted sum 0)."""
    state = torch.zeros(num_blocks, 3, dim, device=device)  # [N, 3, D]
    state[:, 0] = LOWEST
    return state


def naive_hca_update(state: torch.Tensor, kv: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Take one token into each accumulator.

    Equation:
        M' = max(M, gate);  S' = S exp(M - M') + exp(gate - M');  A' = A exp(M - M') + exp(gate - M') kv      [HCA-20..23]

    Args:
        state (torch.Tensor): ``[N, 3, D]``, fp32: M, S, A.
        kv (torch.Tensor): ``[N, D]``, fp32.
        gate (torch.Tensor): ``[N, D]``, fp32, position bias added; -inf has no weight, +inf and NaN make NaN.

    Returns:
        torch.Tensor: ``[N, 3, D]``, fp32.
    """
    maximum, total, pooled = state.unbind(1)
    new_maximum = torch.maximum(maximum, gate)
    keep = torch.exp(maximum - new_maximum)
    weight = torch.exp(gate - new_maximum)
    return torch.stack([new_maximum, total * keep + weight, pooled * keep + weight * kv], dim=1)


def naive_hca_finish(state: torch.Tensor) -> torch.Tensor:
    """Pooled vectors of closed blocks: ``[N, 3, D]`` accumulators to ``[N, D]``, A / S."""
    return state[:, 2] / state[:, 1]


def naive_hca_pool(kv: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Pool whole blocks.

    Equation:
        C[d] = sum_j softmax_j(gate_j[d]) kv_j[d], by the recurrence of `naive_hca_update`      [HCA-20..23]
        Source: report eqs. 20-23; transformers DeepseekV4HCACompressor.

    Args:
        kv (torch.Tensor): ``[N, m, D]``, fp32.
        gate (torch.Tensor): ``[N, m, D]``, fp32, position bias added.

    Returns:
        torch.Tensor: ``[N, D]``, fp32.
    """
    state = naive_hca_start(len(kv), kv.shape[-1], kv.device)
    for offset in range(kv.shape[1]):
        state = naive_hca_update(state, kv[:, offset], gate[:, offset])
    return naive_hca_finish(state)


def finish_entries(raw: torch.Tensor, first_positions: torch.Tensor, params: CompressorParams) -> torch.Tensor:
    """Norm, RoPE at the block's first position, and for index keys the rotation: ``[N, D]`` fp32."""
    entries = naive_rope(naive_rms_norm(raw, params.norm_weight, params.eps), params.cos_sin[first_positions])
    return naive_hadamard(entries) if params.rotate else entries
