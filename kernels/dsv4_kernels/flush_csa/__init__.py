"""Fill a CSA layer: keep its streams, pool closed blocks, store entries and index keys. The fused form is in ``fused``."""

from dsv4_kernels.flush_csa.naive import CsaFlush, naive_flush_csa
from dsv4_kernels.flush_csa.tuning import CsaTuning

__all__ = ["CsaFlush", "CsaTuning", "naive_flush_csa"]
