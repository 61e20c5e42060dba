"""Hadamard rotation of rows inside a kernel, in the reference's order of additions."""

import triton
import triton.language as tl


@triton.jit
def hadamard_rows(b_x, E: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr):
    """Rotate the rows of ``[E, D]``; ``SCALE`` is ``D**-0.5``."""
    b_sign = 1.0 - 2.0 * tl.arange(0, 2)[None, None, :, None].to(tl.float32)
    for i in tl.static_range(D.bit_length() - 1):
        b_pairs = tl.reshape(b_x, [E, D >> (i + 1), 2, 1 << i])  # [E, D / 2^(i+1), 2, 2^i]
        # Sums of two: reducing leaves the result with every thread that needs it, and no data is moved back.
        b_sum = tl.sum(b_pairs, axis=2)[:, :, None, :]
        b_difference = tl.sum(b_pairs * b_sign, axis=2)[:, :, None, :]
        b_x = tl.reshape(tl.where(b_sign > 0, b_sum, b_difference), [E, D])
    return b_x * SCALE
