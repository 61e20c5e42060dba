"""Fill a CSA layer: main compressor and indexer in one launch. The reference is `dsv4_kernels.flush.naive_flush_csa`."""

from dsv4_kernels.flush.naive import CsaFlush
from dsv4_kernels.flush_csa.fused import flush_csa, flush_csa_layer
from dsv4_kernels.flush_csa.tuning import CsaTuning

__all__ = ["CsaFlush", "CsaTuning", "flush_csa", "flush_csa_layer"]
