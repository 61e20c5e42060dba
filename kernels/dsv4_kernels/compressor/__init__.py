"""What the compressors of CSA and HCA layers share: weights, pooling, and the end of every entry."""

from dsv4_kernels.compressor.naive import (
    finish_entries,
    naive_csa_pool,
    naive_hca_finish,
    naive_hca_pool,
    naive_hca_start,
    naive_hca_update,
)
from dsv4_kernels.compressor.params import CompressorParams

__all__ = [
    "CompressorParams",
    "finish_entries",
    "naive_csa_pool",
    "naive_hca_finish",
    "naive_hca_pool",
    "naive_hca_start",
    "naive_hca_update",
]
