"""How a launch of merge, sink and rotation is cut into programs. Measured rows: benchmarks/README.md."""

# Best on an H200 by number of queries, at 64 heads: (heads, pieces, warps) of a program. Larger tiles keep too few programs
# on a multiprocessor to hide the way to memory; more heads at few queries leave multiprocessors idle.
_MEASURED_LANES = 132
_WHOLE = (4, 1, 4)
_SPLIT = ((16, (2, 2, 4)), (66, (8, 1, 8)), (1 << 40, (4, 1, 4)))


def sink_rope_tuning(num_tokens: int, num_lanes: int) -> tuple[int, int, int]:
    """Heads per program, pieces read at once, warps. ``num_lanes`` is 0 where no query has pieces."""
    if num_lanes == 0:
        return _WHOLE
    return next(best for most, best in _SPLIT if num_tokens * _MEASURED_LANES <= most * num_lanes)
