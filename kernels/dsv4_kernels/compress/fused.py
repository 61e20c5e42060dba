"""Pooling inside a kernel: per channel, in the reference's order of slots and tokens.

``exp(x)`` is ``exp2(x log2(e))``, and products are fused into sums explicitly: every specialisation of a kernel rounds
alike. Against the reference a pooled value differs by the rounding of a few exponentials, about 1e-6 of its row.
"""

import triton
import triton.language as tl


@triton.jit
def exp_of_difference(b_x, b_y):
    """``exp(x - y)``."""
    return tl.exp2((b_x - b_y) * 1.4426950408889634)


@triton.jit
def csa_pool(kv, gate):
    """Pool a tuple of rows ``[D]`` by one softmax of their gates; an absent row has gate -inf and kv 0."""
    b_maximum = gate[0]
    for j in tl.static_range(1, len(gate)):
        b_maximum = tl.maximum(b_maximum, gate[j])
    b_total = exp_of_difference(gate[0], b_maximum)
    b_pooled = b_total * kv[0]
    for j in tl.static_range(1, len(gate)):
        b_weight = exp_of_difference(gate[j], b_maximum)
        b_total += b_weight
        b_pooled = tl.fma(b_weight, kv[j], b_pooled)
    return b_pooled / b_total


@triton.jit
def hca_update(b_maximum, b_total, b_pooled, b_kv, b_gate):
    """Take one token into an accumulator.

    One exponential serves both factors: of ``exp(M - M')`` and ``exp(gate - M')`` one is always 1.
    """
    b_new_maximum = tl.maximum(b_maximum, b_gate)
    b_decay = exp_of_difference(tl.minimum(b_maximum, b_gate), b_new_maximum)
    m_larger = b_gate > b_maximum
    b_keep = tl.where(m_larger, b_decay, 1.0)
    b_weight = tl.where(m_larger, 1.0, b_decay)
    b_pooled = tl.fma(b_weight, b_kv, b_pooled * b_keep)
    return b_new_maximum, tl.fma(b_total, b_keep, b_weight), b_pooled
