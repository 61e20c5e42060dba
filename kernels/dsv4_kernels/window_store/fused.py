"""Fused window store: norm, RoPE and store of every new token's row, in one launch."""

import torch
import triton
import triton.language as tl

from dsv4_kernels.device import EXACT, check_contiguous, check_rows, hardware_casts
from dsv4_kernels.flush.fused import store_row
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.row_codec.fused import store_format
from dsv4_kernels.step import StepTensors


@triton.jit(do_not_specialize=["page_stride"])
def window_store_kernel(
    p_positions, p_token_rows, p_window_pages, page_stride, p_kv, token_stride, p_weight, eps, p_cos_sin, p_pool,
    D: tl.constexpr, C: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, CASTS: tl.constexpr,
):  # fmt: skip
    """One token per program, in chunks of ``C`` channels; a token of position -1 is padding."""
    token = tl.program_id(0).to(tl.int64)
    # Read before anything waits.
    chunks = ()
    for c in tl.static_range(D // C):
        p_row = p_kv + token * token_stride + c * C + tl.arange(0, C)
        chunks = chunks + (tl.load(p_row).to(tl.float32),)
    position = tl.load(p_positions + token)
    if position >= 0:
        row = tl.load(p_token_rows + token)
        page = tl.load(p_window_pages + row * page_stride + position // PAGE)
        slot = page * PAGE + position % PAGE
        store_row(
            chunks, p_weight, eps, p_cos_sin + position * R, p_pool, slot, D, R, False, FORMAT, CASTS
        )  # fmt: skip


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
    warps, chunk = window_tuning(len(kv))
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
        C=chunk,
        R=cos_sin.shape[1],
        PAGE=step.page_tokens,
        FORMAT=store_format(pool_format),
        CASTS=hardware_casts(kv.device),
        num_warps=warps,
        **EXACT,
    )


def window_tuning(num_tokens: int) -> tuple[int, int]:
    """Warps per program, and channels that it holds at once."""
    return (4, 512) if num_tokens <= 512 else (1, 256)
