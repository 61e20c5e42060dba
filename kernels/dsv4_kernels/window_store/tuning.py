"""How a launch of the window store is cut into programs. Measured rows: benchmarks/README.md."""


def window_tuning(num_tokens: int) -> tuple[int, int]:
    """Rows and warps per program."""
    return (1, 4) if num_tokens <= 512 else (4, 4)
