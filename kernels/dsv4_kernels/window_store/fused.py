"""Fused window store: norm, RoPE and store of every new token's row, in one launch."""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import EXACT, check_contiguous, check_rows, hardware_casts
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.norm_rope.fused import rms_norm_row, rope_row
from dsv4_kernels.row_codec.fused import store_format, store_row
from dsv4_kernels.step import StepTensors


@triton.jit(do_not_specialize=["page_stride"])
def window_store_kernel(
    p_positions, p_token_rows, p_window_pages, page_stride, p_kv, token_stride, p_weight, eps, p_cos_sin, p_pool,
    D: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, CASTS: tl.constexpr,
):  # fmt: skip
    """One program per token; a token of position -1 is padding."""
    i_t = tl.program_id(0).to(tl.int64)
    position = tl.load(p_positions + i_t)
    row = tl.load(p_token_rows + i_t)
    b_x = tl.load(p_kv + i_t * token_stride + tl.arange(0, D)).to(tl.float32)  # [D]
    if position >= 0:
        page = tl.load(p_window_pages + row * page_stride + position // PAGE)
        b_x = rms_norm_row(b_x, p_weight, eps, D)
        b_x = rope_row(b_x, p_cos_sin + position * R, D, R)
        store_row(p_pool, page * PAGE + position % PAGE, b_x, FORMAT, D, CASTS)


def window_store(
    step: StepTensors,
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    pool: torch.Tensor,
    pool_format: RowFormat,
) -> None:
    """`naive_window_store` in one launch; arguments as there.

    Capture-safe: yes.   Host sync: none.   Allocates: nothing.   Writes: pool.
    """
    check_rows("kv", kv)
    check_rows("window_pages", step.window_pages)
    for name, tensor in (("cos_sin", cos_sin), ("pool", pool), ("positions", step.positions)):
        check_contiguous(name, tensor)
    if len(kv) == 0:
        return
    window_store_kernel[(len(kv),)](
        p_positions=step.positions,
        p_token_rows=step.token_rows,
        p_window_pages=step.window_pages,
        page_stride=step.window_pages.stride(0),
        p_kv=kv,
        token_stride=kv.stride(0),
        p_weight=norm_weight,
        eps=eps,
        p_cos_sin=cos_sin,
        p_pool=pool,
        D=kv.shape[1],
        R=cos_sin.shape[1],
        PAGE=step.page_tokens,
        FORMAT=store_format(pool_format),
        CASTS=hardware_casts(kv.device),
        num_warps=1,
        **EXACT,
    )
