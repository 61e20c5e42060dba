"""Tiny random-weight DeepSeek-V4 checkpoints, for demonstrations and tests."""

from sglang_dsv4.tiny.checkpoint import holds_checkpoint, write_tiny_checkpoint
from sglang_dsv4.tiny.command import add_parser
from sglang_dsv4.tiny.spec import SHAPES, TinySpec

__all__ = ["SHAPES", "TinySpec", "add_parser", "holds_checkpoint", "write_tiny_checkpoint"]
