"""Rotate index queries, and number the tiles of their scores. The fused form is in ``fused``."""

from dsv4_kernels.index_query.naive import naive_index_query, naive_round_query

__all__ = ["naive_index_query", "naive_round_query"]
