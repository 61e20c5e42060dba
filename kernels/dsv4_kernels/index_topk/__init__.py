"""Choose each token's best entries by their scores. The fused form is in ``fused``."""

from dsv4_kernels.index_topk.naive import naive_topk_entries
from dsv4_kernels.index_topk.tuning import GROUP

__all__ = ["GROUP", "naive_topk_entries"]
