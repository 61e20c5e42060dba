"""From attention without a sink to attention's output: merge of pieces, sink, inverse RoPE."""

from dsv4_kernels.sink_rope.naive import naive_sink_rope
from dsv4_kernels.sink_rope.splits import Splits

__all__ = ["Splits", "naive_sink_rope"]
