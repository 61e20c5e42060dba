"""Attention over the compressed cache: plan once per step, run once per layer."""

from sglang_dsv4.attention.base import Attention
from sglang_dsv4.attention.eager import EagerAttention

__all__ = ["Attention", "EagerAttention"]
