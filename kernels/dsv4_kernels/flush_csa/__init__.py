"""Fill a CSA layer: main compressor and indexer in one launch. The reference is `dsv4_kernels.flush.naive_flush_csa`."""

from dsv4_kernels.flush.naive import CsaFlush
from dsv4_kernels.flush_csa.fused import CsaTuning, flush_csa, flush_csa_layer

__all__ = ["CsaFlush", "CsaTuning", "flush_csa", "flush_csa_layer"]
