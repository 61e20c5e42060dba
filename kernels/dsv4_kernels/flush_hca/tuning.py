"""How a launch of the HCA flush is cut into programs. Measured rows: benchmarks/README.md."""

from typing import NamedTuple


class HcaTuning(NamedTuple):
    """How a launch is cut; the bytes written do not depend on it.

    Attributes:
        unroll (int): tokens that are loaded ahead.
        warps (int): warps per program.
        split (int): programs that share a block's channels.
    """

    unroll: int
    warps: int
    split: int


def hca_tuning(num_tokens: int, num_requests: int, *, has_workspace: bool = True) -> HcaTuning:
    """The tuning for a step of this shape; programs share channels only where they have a workspace.

    A decode step takes one token per request. A prefill's blocks take 128 tokens one after another, and are few: the
    fewer, the more programs share the channels of each, and the more tokens each of these must have in flight.
    """
    if num_tokens <= num_requests:
        return HcaTuning(1, 2, 1)
    if num_tokens <= 8 * num_requests or not has_workspace:
        return HcaTuning(4, 4, 1)
    if num_tokens <= 16384:
        return HcaTuning(16, 1, 16)
    return HcaTuning(4, 1, 4)
