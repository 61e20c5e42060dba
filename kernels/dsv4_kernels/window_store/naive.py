"""Reference window store."""

import torch

from dsv4_kernels.layout import RowFormat
from dsv4_kernels.norm_rope.naive import naive_rms_norm, naive_rope
from dsv4_kernels.row_codec.naive import naive_store_rows
from dsv4_kernels.step import StepTensors


def naive_window_store(
    step: StepTensors,
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    pool: torch.Tensor,
    pool_format: RowFormat,
) -> None:
    """Norm, rotate and store the window row of every new token.

    Equation: row_t = ROPE_t(NORM(kv_t))      [NORM], [ROPE]

    Args:
        step (StepTensors): the step.
        kv (torch.Tensor): ``[T, 512]``, the projection before its norm.
        norm_weight (torch.Tensor): ``[512]``.
        eps (float): RMSNorm epsilon.
        cos_sin (torch.Tensor): ``[P, 64]``, fp32, from `dsv4_kernels.norm_rope.rope_table`.
        pool (torch.Tensor): the layer's row pool. Written at `StepTensors.window_slots`.
        pool_format (RowFormat): the pool's format.
    """
    rows = naive_rope(naive_rms_norm(kv, norm_weight, eps), cos_sin[step.positions])
    naive_store_rows(pool, step.window_slots(step.token_rows, step.positions), rows, pool_format)
