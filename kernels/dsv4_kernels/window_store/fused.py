"""Fused window store: norm, RoPE and store of every new token's row, in one launch."""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import EXACT, check_contiguous, check_rows, hardware_casts
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.norm_rope.fused import store_normed
from dsv4_kernels.row_codec.fused import store_format
from dsv4_kernels.step import StepTensors
from dsv4_kernels.window_store.tuning import window_tuning


@triton.jit(do_not_specialize=["num_tokens", "page_stride"])
def window_store_kernel(
    p_positions,
    p_token_rows,
    p_window_pages,
    page_stride,
    p_kv,
    token_stride,
    p_weight,
    eps,
    p_cos_sin,
    p_pool,
    num_tokens,
    E: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
    CASTS: tl.constexpr,
):
    """``E`` tokens per program; a token of position -1 is padding."""
    o_t = tl.program_id(0) * E + tl.arange(0, E)  # [E]
    m_t = o_t < num_tokens
    b_position = tl.load(p_positions + o_t, mask=m_t, other=-1)
    b_row = tl.load(p_token_rows + o_t, mask=m_t, other=0)
    p_row = p_kv + o_t.to(tl.int64) * token_stride
    b_x = tl.load(p_row[:, None] + tl.arange(0, D)[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)  # [E, D]
    m_t = b_position >= 0
    b_page = tl.load(p_window_pages + b_row * page_stride + b_position // PAGE, mask=m_t, other=0)
    store_normed(
        (b_x,),
        p_weight,
        eps,
        p_cos_sin + b_position * R,
        p_pool,
        b_page * PAGE + b_position % PAGE,
        m_t,
        E,
        D,
        R,
        False,
        FORMAT,
        CASTS,
    )


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
    rows, warps = window_tuning(len(kv))
    window_store_kernel[(triton.cdiv(len(kv), rows),)](
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
        num_tokens=len(kv),
        E=rows,
        D=kv.shape[1],
        R=cos_sin.shape[1],
        PAGE=step.page_tokens,
        FORMAT=store_format(pool_format),
        CASTS=hardware_casts(kv.device),
        num_warps=warps,
        **EXACT,
    )
