"""RMSNorm and RoPE of one row inside a kernel, with the reference's order of additions."""

import triton
import triton.language as tl


@triton.jit
def tree_sum(b_x, D: tl.constexpr):
    """Sum ``[D]`` by halving: every addition has two operands, so its result cannot depend on the data's layout."""
    for i in tl.static_range(D.bit_length() - 1):
        b_x = tl.sum(tl.reshape(b_x, [2, D >> (i + 1)]), axis=0)
    return tl.sum(b_x, axis=0)


@triton.jit
def rms_norm_row(b_x, p_weight, eps, D: tl.constexpr):
    """Normalise ``[D]`` by its root mean square."""
    mean_square = tree_sum(b_x * b_x, D) / D
    b_weight = tl.load(p_weight + tl.arange(0, D)).to(tl.float32)
    return b_x * tl.rsqrt(mean_square + eps) * b_weight


@triton.jit
def rope_row(b_x, p_cos_sin, D: tl.constexpr, R: tl.constexpr):
    """Rotate the last ``R`` channels of ``[D]`` in interleaved pairs, by one row of the table."""
    o_pair = tl.arange(0, D // 2) - (D - R) // 2
    m_pair = o_pair >= 0
    b_cos = tl.load(p_cos_sin + o_pair, mask=m_pair, other=1.0)
    b_sin = tl.load(p_cos_sin + R // 2 + o_pair, mask=m_pair, other=0.0)
    b_even, b_odd = tl.split(tl.reshape(b_x, [D // 2, 2]))
    # Unrotated pairs are selected, not multiplied by (1, 0): that could change the sign of a zero.
    b_first = tl.where(m_pair, b_even * b_cos - b_odd * b_sin, b_even)
    b_second = tl.where(m_pair, b_even * b_sin + b_odd * b_cos, b_odd)
    return tl.reshape(tl.join(b_first, b_second), [D])
