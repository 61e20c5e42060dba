"""RMSNorm and RoPE of rows inside a kernel, with one order of additions whatever the number of threads."""

import triton
import triton.language as tl


@triton.jit
def tree_sum(b_x, E: tl.constexpr, D: tl.constexpr):
    """Sum ``[E, D]`` to ``[E]`` by adding neighbours: every addition has two operands, so no layout changes its result.

    Neighbours first, since they lie in one thread; the reference adds halves first, which differs in the last bit.
    """
    for i in tl.static_range(D.bit_length() - 1):
        b_x = tl.sum(tl.reshape(b_x, [E, D >> (i + 1), 2]), axis=2)
    return tl.reshape(b_x, [E])


@triton.jit
def rms_norm_rows(b_x, b_weight, eps, E: tl.constexpr, D: tl.constexpr):
    """Normalise the rows of ``[E, D]`` by their root mean square; the weights ``[D]`` are loaded before."""
    b_scale = tl.rsqrt(tree_sum(b_x * b_x, E, D) / D + eps)  # [E]
    return b_x * b_scale[:, None] * b_weight.to(tl.float32)[None, :]


@triton.jit
def load_rope(p_cos_sin, m_e, E: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Cosines and sines ``[E, D/2]`` of each row's row ``[E]`` of the table; 1 and 0 where nothing is rotated."""
    o_pair = (tl.arange(0, D // 2) - (D - R) // 2)[None, :]
    m_pair = (o_pair >= 0) & m_e[:, None]
    p_pair = p_cos_sin[:, None] + o_pair
    b_cos = tl.load(p_pair, mask=m_pair, other=1.0)
    b_sin = tl.load(p_pair + R // 2, mask=m_pair, other=0.0)
    return b_cos, b_sin


@triton.jit
def rope_rows(b_x, b_cos, b_sin, E: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Rotate the last ``R`` channels of ``[E, D]`` in interleaved pairs, by what `load_rope` read."""
    m_pair = (tl.arange(0, D // 2) >= (D - R) // 2)[None, :]
    b_even, b_odd = tl.split(tl.reshape(b_x, [E, D // 2, 2]))
    # Unrotated pairs are selected, not multiplied by (1, 0): that could change the sign of a zero.
    b_first = tl.where(m_pair, tl.fma(b_even, b_cos, -(b_odd * b_sin)), b_even)
    b_second = tl.where(m_pair, tl.fma(b_even, b_sin, b_odd * b_cos), b_odd)
    return tl.reshape(tl.join(b_first, b_second), [E, D])
