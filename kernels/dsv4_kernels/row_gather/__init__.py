"""Listed rows of a packed pool, decoded into a dense bf16 workspace."""

from dsv4_kernels.row_gather.naive import naive_row_gather

__all__ = ["naive_row_gather"]
