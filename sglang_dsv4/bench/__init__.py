"""``python -m sglang_dsv4 bench``: speed of the kernels, each checked against its reference before it is timed."""
