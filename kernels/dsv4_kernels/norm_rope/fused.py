"""RMSNorm, RoPE and store of rows inside a kernel, with one order of additions whatever the number of threads.

Rows ``[E, D]`` are held as a tuple of *chunks* ``[E, C]``: a program of one warp takes long rows chunk by chunk and needs few
registers, one of many warps takes them whole. The bytes are the same.
"""

import triton
import triton.language as tl

from dsv4_kernels.hadamard.fused import hadamard_rows
from dsv4_kernels.row_codec.fused import store_chunk


@triton.jit
def tree_sum(b_x, E: tl.constexpr, D: tl.constexpr):
    """Sum ``[E, D]`` to ``[E]`` by adding neighbours: every addition has two operands, so no layout changes its result.

    Neighbours first, since they lie in one thread; the reference adds halves first, which differs in the last bit.
    """
    for i in tl.static_range(D.bit_length() - 1):
        b_x = tl.sum(tl.reshape(b_x, [E, D >> (i + 1), 2]), axis=2)
    return tl.reshape(b_x, [E])


@triton.jit
def norm_scale(chunks, eps, E: tl.constexpr, D: tl.constexpr):
    """One over the root mean square of rows ``[E]``; the sums of their chunks go on with the same tree."""
    C: tl.constexpr = D // len(chunks)
    sums = ()
    for c in tl.static_range(len(chunks)):
        sums = sums + (tree_sum(chunks[c] * chunks[c], E, C),)
    for i in tl.static_range(len(chunks).bit_length() - 1):
        pairs = ()
        for c in tl.static_range(len(chunks) >> (i + 1)):
            pairs = pairs + (sums[2 * c] + sums[2 * c + 1],)
        sums = pairs
    return tl.rsqrt(sums[0] / D + eps)


@triton.jit
def load_rope(p_cos_sin, m_e, FIRST: tl.constexpr, C: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Cosines and sines ``[E, C/2]`` for the channels from ``FIRST`` on, of each row's row ``[E]`` of the table; 1 and 0 where
    nothing is rotated.
    """
    o_pair = ((FIRST - (D - R)) // 2 + tl.arange(0, C // 2))[None, :]  # [1, C/2]
    m_pair = (o_pair >= 0) & m_e[:, None]
    p_pair = p_cos_sin[:, None] + o_pair  # [E, C/2]
    b_cos = tl.load(p_pair, mask=m_pair, other=1.0)
    b_sin = tl.load(p_pair + R // 2, mask=m_pair, other=0.0)
    return b_cos, b_sin


@triton.jit
def rope_chunk(b_x, b_cos, b_sin, FIRST: tl.constexpr, E: tl.constexpr, C: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Rotate what a chunk holds of the rows' last ``R`` channels in interleaved pairs, by what `load_rope` read."""
    m_pair = ((FIRST - (D - R)) // 2 + tl.arange(0, C // 2) >= 0)[None, :]
    b_even, b_odd = tl.split(tl.reshape(b_x, [E, C // 2, 2]))  # [E, C/2]
    # Unrotated pairs are selected, not multiplied by (1, 0): that could change the sign of a zero.
    b_first = tl.where(m_pair, tl.fma(b_even, b_cos, -(b_odd * b_sin)), b_even)
    b_second = tl.where(m_pair, tl.fma(b_even, b_sin, b_odd * b_cos), b_odd)
    return tl.reshape(tl.join(b_first, b_second), [E, C])


@triton.jit
def store_normed(
    chunks,
    p_weight,
    eps,
    p_cos_sin,
    p_pool,
    b_slot,
    m_e,
    E: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    ROTATE: tl.constexpr,
    FORMAT: tl.constexpr,
    CASTS: tl.constexpr,
):
    """Norm, rotate and store rows, a tuple of chunks ``[E, C]``; ``p_cos_sin`` ``[E]`` is each row's row of the table."""
    C: tl.constexpr = D // len(chunks)
    # All loads before the norm: it makes threads wait for each other, and no load may be moved over that.
    LAST: tl.constexpr = D - C  # the rotated channels are in the last chunk
    b_cos, b_sin = load_rope(p_cos_sin, m_e, LAST, C, D, R)
    weights = ()
    for c in tl.static_range(len(chunks)):
        weights = weights + (tl.load(p_weight + c * C + tl.arange(0, C)).to(tl.float32),)
    b_scale = norm_scale(chunks, eps, E, D)[:, None]  # [E, 1]
    for c in tl.static_range(len(chunks)):
        b_x = chunks[c] * b_scale * weights[c][None, :]  # [E, C]
        if c * C == LAST:
            b_x = rope_chunk(b_x, b_cos, b_sin, LAST, E, C, D, R)
        if ROTATE:
            b_x = hadamard_rows(b_x, E, D, D**-0.5)  # an index key is one chunk
        store_chunk(p_pool, b_slot, b_x, m_e, c * C, FORMAT, E, C, D, CASTS)
