"""Rows of a CSA compressor's input and state inside its kernel: read, and kept for later blocks."""

import triton
import triton.language as tl


@triton.jit
def load_row(p_new, p_old, is_new, is_there, absent, o_d):
    """A part of a row of this step's input or of the state; ``absent`` where there is none."""
    if p_new.dtype.element_ty == tl.float32:
        return tl.load(tl.where(is_new, p_new, p_old) + o_d, mask=is_there, other=absent)
    b_old = tl.load(p_old + o_d, mask=is_there & (is_new == 0), other=absent)
    b_new = tl.load(p_new + o_d, mask=is_there & is_new, other=0.0).to(tl.float32)
    return tl.where(is_new, b_new, b_old)


@triton.jit
def load_token(comp, token, is_there, S: tl.constexpr):
    """A token's row in two halves ``[2*D]``: both kv streams, both gates."""
    o_h = tl.arange(0, 2 * S.dim)  # [2 D]
    p_row = comp.kv_score + token.to(tl.int64) * S.token_stride + o_h
    b_kv = tl.load(p_row, mask=is_there, other=0.0)
    b_gate = tl.load(p_row + 2 * S.dim, mask=is_there, other=0.0)
    return b_kv.to(tl.float32), b_gate.to(tl.float32)


@triton.jit
def keep_in_ring(comp, slot, position, b_kv, b_gate, S: tl.constexpr):
    """Write a token's row, as `load_token` gives it, to its request's stream rows."""
    o_h = tl.arange(0, 2 * S.dim)  # [2 D]
    p_ring = comp.state + (slot * S.ring + position % S.ring) * (4 * S.dim) + o_h
    tl.store(p_ring, b_kv)
    tl.store(p_ring + 2 * S.dim, b_gate)


@triton.jit
def keep_in_boundary(step, comp, row, position, b_kv, b_gate, page_stride, S: tl.constexpr):
    """Write the b-stream of a token of its page's last block to the page's boundary state."""
    o_h = tl.arange(0, 2 * S.dim)  # [2 D]
    page = tl.load(step.window_pages + row * page_stride + position // S.page_tokens)
    p_kept = comp.boundary + (page * S.ratio + position % S.ratio) * (2 * S.dim) + o_h
    tl.store(p_kept, b_kv, mask=o_h < S.dim)
    tl.store(p_kept + S.dim, b_gate, mask=o_h < S.dim)
