"""Attention of each query token over its own list of rows."""

from dsv4_kernels.sparse_attention.naive import naive_sparse_attention

__all__ = ["naive_sparse_attention"]
