"""Score CSA entries for each query token and choose the best; the fused form is in ``fused``."""

from dsv4_kernels.index_score.naive import (
    naive_index_query,
    naive_index_scores,
    naive_round_query,
    naive_select_entries,
    naive_topk_entries,
)

__all__ = ["naive_index_query", "naive_index_scores", "naive_round_query", "naive_select_entries", "naive_topk_entries"]
