"""How a launch of the top-k is cut. What was tried: benchmarks/README.md."""

# Entries of a group; a group's best score is its maximum.
GROUP = 8
WARPS = 8
# From so many programs on there are two or more for each multiprocessor of the largest GPUs.
_MANY_TOKENS = 256


def topk_levels(max_entries: int, k: int) -> tuple[int, int, int]:
    """Numbers that a program ranks at a time, those of a short row, and levels of the tournament.

    Raises:
        ValueError: ``max_entries`` are more than three levels take.
    """
    size = GROUP * (1 << (k - 1).bit_length())
    small = size // 4
    levels = 1
    while size * GROUP ** (levels - 1) < max_entries:
        levels += 1
    if levels > 3:
        raise ValueError(f"scores: expected at most {size * GROUP**2} entries for k = {k}, got {max_entries}")
    return size, small, levels


def topk_registers(num_tokens: int, levels: int) -> int | None:
    """Registers of a thread: few where many programs wait for each other's reductions, all where a program is alone."""
    if num_tokens < _MANY_TOKENS:
        return None
    return 64 if levels < 3 else 128
