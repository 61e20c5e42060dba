"""Fill a CSA layer: main compressor and indexer in one launch. The reference is `dsv4_kernels.flush.naive_flush_csa`."""

from dsv4_kernels.flush_csa.fused import CsaFlush, flush_csa, flush_csa_layer

__all__ = ["CsaFlush", "flush_csa", "flush_csa_layer"]
