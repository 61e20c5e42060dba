"""The two streams of a CSA compressor, and the only place that knows how a checkpoint orders them.

Of the ``2*D`` outputs of a CSA compressor's ``wkv`` and ``wgate``, the checkpoint puts the **b-stream first** and the
**a-stream second**. The a-stream of a token is pooled into the token's own block, the b-stream into the *next* block
(report eqs. 9-12). Transformers names the halves ``Ca`` (first) and ``Cb`` (second), the reverse of the report.

A ``kv_score`` row is ``[kv | gate]``: CSA ``[kv_b, kv_a, gate_b, gate_a]``, HCA ``[kv, gate]``, each part ``D`` wide.
"""

import torch

CSA_PARTS = 4
HCA_PARTS = 2


def csa_parts(kv_score: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """Split CSA rows ``[..., 4*D]`` into views ``(kv_b, kv_a, gate_b, gate_a)``, each ``[..., D]``."""
    kv_b, kv_a, gate_b, gate_a = kv_score.split(dim, dim=-1)
    return kv_b, kv_a, gate_b, gate_a


def csa_streams(kv_score: torch.Tensor) -> torch.Tensor:
    """View CSA rows ``[..., 4*D]`` as ``[..., 2, 2, D]``: kv and gate, each of the b-stream and of the a-stream."""
    return kv_score.unflatten(-1, (2, 2, -1))


def slot_bias(position_bias: torch.Tensor, dim: int) -> torch.Tensor:
    """Reorder a checkpoint's position bias into pooling slots.

    Args:
        position_bias (torch.Tensor): ``[m, D]`` (HCA) or ``[m, 2*D]`` (CSA), fp32, the checkpoint's ``ape``.
        dim (int): ``D``.

    Returns:
        torch.Tensor: ``[m, D]`` or ``[2*m, D]``: for CSA the m rows of the previous block's b-stream, then the m rows of
        the own block's a-stream.
    """
    if position_bias.shape[-1] == dim:
        return position_bias.contiguous()
    bias_b, bias_a = position_bias.split(dim, dim=-1)
    return torch.cat([bias_b, bias_a], dim=0)
