"""Score CSA entries for each query token. The fused form is in ``fused``."""

from dsv4_kernels.index_score.naive import naive_index_scores

__all__ = ["naive_index_scores"]
