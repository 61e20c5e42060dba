"""Choose each token's best entries by their scores. The reference is `dsv4_kernels.index_score.naive_topk_entries`."""

from dsv4_kernels.index_topk.fused import GROUP, topk_entries

__all__ = ["GROUP", "topk_entries"]
