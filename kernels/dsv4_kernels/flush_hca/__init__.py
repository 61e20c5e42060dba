"""Fill an HCA layer in one launch. The reference is `dsv4_kernels.flush.naive_flush_hca`."""

from dsv4_kernels.flush_hca.fused import HcaWorkspace, flush_hca, hca_workspace
from dsv4_kernels.flush_hca.tuning import HcaTuning

__all__ = ["HcaTuning", "HcaWorkspace", "flush_hca", "hca_workspace"]
