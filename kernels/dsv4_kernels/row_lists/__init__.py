"""The rows that each query attends to, as lists for an attention kernel."""

from dsv4_kernels.row_lists.kind import ListKind
from dsv4_kernels.row_lists.naive import naive_row_lists

__all__ = ["ListKind", "naive_row_lists"]
