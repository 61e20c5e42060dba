"""Fill an HCA layer: keep its accumulators, store the entries of closed blocks. The fused form is in ``fused``."""

from dsv4_kernels.flush_hca.naive import naive_flush_hca
from dsv4_kernels.flush_hca.tuning import HcaTuning

__all__ = ["HcaTuning", "naive_flush_hca"]
