"""How a launch of the CSA flush is cut into programs. What was tried: benchmarks/README.md."""

from typing import NamedTuple


class CsaTuning(NamedTuple):
    """How a launch is cut; the bytes written do not depend on it.

    Attributes:
        warps (int): warps per program.
        chunk (int): channels of the pooled rows that a program holds at once.
        main_blocks (int): entries that a token program pools together.
        index_blocks (int): index keys that a token program pools together.
        options (dict[str, int]): of the compiler.
    """

    warps: int
    chunk: int
    main_blocks: int
    index_blocks: int
    options: dict[str, int]


def csa_tuning(num_tokens: int, num_requests: int) -> CsaTuning:
    """The tuning for a step of this shape.

    A decode step waits for one block's latency: a program takes all its channels at once. A long prefill needs many loads in
    flight: one warp, which waits for no other, takes 16 bytes a thread at a time, and many fit on a multiprocessor.
    """
    if num_tokens <= 8 * num_requests:
        return CsaTuning(4, 512, 1, 4, {})
    if num_tokens <= 2048:
        return CsaTuning(4, 512, 1, 1, {})
    return CsaTuning(1, 128, 1, 1, {"maxnreg": 128})
