"""Attention over the compressed cache: begin once per step, run once per layer."""

from sglang_dsv4.attention.base import Attention
from sglang_dsv4.attention.choose import choose_attention, make_attention, name_attention
from sglang_dsv4.attention.eager import EagerAttention
from sglang_dsv4.attention.host_lengths import HostLengths
from sglang_dsv4.attention.requirements import Capabilities, find_capabilities
from sglang_dsv4.attention.row_list_kinds import FixedShape

__all__ = [
    "Attention",
    "Capabilities",
    "EagerAttention",
    "FixedShape",
    "HostLengths",
    "choose_attention",
    "find_capabilities",
    "make_attention",
    "name_attention",
]
