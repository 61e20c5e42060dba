"""Fill the cache: keep stream state, pool closed blocks, store their entries."""

from dsv4_kernels.flush.naive import CompressorParams, naive_flush_csa, naive_flush_hca

__all__ = ["CompressorParams", "naive_flush_csa", "naive_flush_hca"]
