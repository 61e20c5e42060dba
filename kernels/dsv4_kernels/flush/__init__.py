"""Fill the cache: keep stream state, pool closed blocks, store their entries."""

from dsv4_kernels.flush.naive import CompressorParams, CsaFlush, naive_flush_csa, naive_flush_hca

__all__ = ["CompressorParams", "CsaFlush", "naive_flush_csa", "naive_flush_hca"]
