"""The tiny checkpoints that servers are checked and measured with."""

from collections.abc import Callable
from pathlib import Path

from sglang_dsv4.tiny import SHAPES, TinySpec, holds_checkpoint, write_tiny_checkpoint


def ready_checkpoint(path: Path, spec: TinySpec, say: Callable[[str], None] = lambda text: None) -> Path:
    """A checkpoint with random weights, written unless it is there; ``say`` is called before a long wait."""
    if not holds_checkpoint(path, spec):
        say(f"Writing {path}, random weights")
        write_tiny_checkpoint(path, spec)
    return path


def shaped_spec(shape: str, layers: tuple[int, ...] = TinySpec.compress_ratios) -> TinySpec:
    """One of `SHAPES` without scaled RoPE: SGLang's own backend and ours then rotate window-only layers alike.

    Args:
        shape (str): key of `SHAPES`.
        layers (tuple[int, ...]): one compression ratio each.
    """
    hashed = min(TinySpec.num_hash_layers, len(layers))
    return TinySpec(compress_ratios=layers, rope_factor=1, num_hash_layers=hashed, **SHAPES[shape])
