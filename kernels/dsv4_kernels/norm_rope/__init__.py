"""RMSNorm and rotary embedding of rows."""

from dsv4_kernels.norm_rope.naive import naive_rms_norm, naive_rope
from dsv4_kernels.norm_rope.table import RopeSpec, rope_table

__all__ = ["RopeSpec", "naive_rms_norm", "naive_rope", "rope_table"]
