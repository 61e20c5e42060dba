"""Choose each token's best entries by their scores. The reference is `dsv4_kernels.index_score.naive_topk_entries`."""

from dsv4_kernels.index_topk.fused import TopkWorkspace, topk_entries, topk_workspace

__all__ = ["TopkWorkspace", "topk_entries", "topk_workspace"]
