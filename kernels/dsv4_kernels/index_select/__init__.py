"""The indexer whole: round queries, score entries, choose the best. The fused form is in ``fused``."""

from dsv4_kernels.index_select.naive import naive_select_entries

__all__ = ["naive_select_entries"]
