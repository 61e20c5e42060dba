"""RMSNorm and RoPE of a row inside a kernel, with one order of additions whatever the number of threads.

A row of ``D`` channels is held as a tuple of chunks of ``C``. A program of one warp takes a long row chunk by chunk and
needs few registers; one of many warps takes it whole. The bytes are the same.
"""

import triton
import triton.language as tl


@triton.jit
def tree_sum(b_x, C: tl.constexpr):
    """Sum ``[C]`` to a number by adding neighbours: every addition has two operands, so no layout changes its result.

    Neighbours first, since they lie in one thread; the reference adds halves first, which differs in the last bit.
    """
    for i in tl.static_range(C.bit_length() - 1):
        b_x = tl.sum(tl.reshape(b_x, [C >> (i + 1), 2]), axis=1)
    return tl.sum(b_x, axis=0)  # of one value


@triton.jit
def norm_scale(chunks, eps, D: tl.constexpr, C: tl.constexpr):
    """One over the root mean square of a row; its chunks' sums go on with the same tree."""
    sums = ()
    for c in tl.static_range(D // C):
        sums = sums + (tree_sum(chunks[c] * chunks[c], C),)
    for i in tl.static_range((D // C).bit_length() - 1):
        pairs = ()
        for c in tl.static_range(len(sums) // 2):
            pairs = pairs + (sums[2 * c] + sums[2 * c + 1],)
        sums = pairs
    return tl.rsqrt(sums[0] / D + eps)


@triton.jit
def rope_chunk(
    b_x, p_cos_sin, FIRST: tl.constexpr, C: tl.constexpr, D: tl.constexpr, R: tl.constexpr
):
    """Rotate what a chunk holds of the row's last ``R`` channels, in interleaved pairs; ``FIRST`` is its first channel."""
    if FIRST + C > D - R:
        o_pair = (FIRST - (D - R)) // 2 + tl.arange(0, C // 2)
        m_pair = o_pair >= 0
        b_cos = tl.load(p_cos_sin + o_pair, mask=m_pair, other=1.0)
        b_sin = tl.load(p_cos_sin + R // 2 + o_pair, mask=m_pair, other=0.0)
        b_even, b_odd = tl.split(tl.reshape(b_x, [C // 2, 2]))
        # Unrotated pairs are selected, not multiplied by (1, 0): that could change the sign of a zero.
        b_first = tl.where(m_pair, tl.fma(b_even, b_cos, -(b_odd * b_sin)), b_even)
        b_second = tl.where(m_pair, tl.fma(b_even, b_sin, b_odd * b_cos), b_odd)
        b_x = tl.reshape(tl.join(b_first, b_second), [C])
    return b_x
