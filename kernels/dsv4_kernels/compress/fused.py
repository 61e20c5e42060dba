"""Pooling inside a kernel: per channel, in the reference's order."""

import triton
import triton.language as tl


@triton.jit
def csa_pool(kv, gate):
    """Pool a tuple of rows ``[D]`` by one softmax of their gates; an absent row has gate -inf and kv 0."""
    b_maximum = gate[0]
    for j in tl.static_range(1, len(gate)):
        b_maximum = tl.maximum(b_maximum, gate[j])
    b_total = tl.exp(gate[0] - b_maximum)
    b_pooled = b_total * kv[0]
    for j in tl.static_range(1, len(gate)):
        b_weight = tl.exp(gate[j] - b_maximum)
        b_total += b_weight
        b_pooled += b_weight * kv[j]
    return tl.div_rn(b_pooled, b_total)


@triton.jit
def hca_update(b_maximum, b_total, b_pooled, b_kv, b_gate):
    """Take one token into an accumulator.

    One exponential serves both factors: of ``exp(M - M')`` and ``exp(gate - M')`` one is always 1.
    """
    b_excess = b_gate - b_maximum
    b_decay = tl.exp(-tl.abs(b_excess))
    m_larger = b_excess > 0
    b_keep = tl.where(m_larger, b_decay, 1.0)
    b_weight = tl.where(m_larger, 1.0, b_decay)
    return tl.maximum(b_maximum, b_gate), b_total * b_keep + b_weight, b_pooled * b_keep + b_weight * b_kv
