"""The checkpoints that servers are measured and compared with."""

from collections.abc import Callable
from pathlib import Path

from sglang_dsv4.tiny import SHAPES, TinySpec, holds_checkpoint, write_tiny_checkpoint


def ready_checkpoint(
    folder: Path, shape: str, say: Callable[[str], None], layers: tuple[int, ...] = TinySpec.compress_ratios
) -> Path:
    """A checkpoint with random weights of one of `SHAPES`, written unless it is there.

    Its RoPE is not scaled: SGLang's own backend and ours then rotate window-only layers alike.

    Args:
        folder (Path): of all checkpoints.
        shape (str): key of `SHAPES`.
        say (Callable[[str], None]): told before a long wait.
        layers (tuple[int, ...]): one compression ratio each.
    """
    spec = TinySpec(
        compress_ratios=layers, rope_factor=1, num_hash_layers=min(TinySpec.num_hash_layers, len(layers)), **SHAPES[shape]
    )
    path = folder / f"checkpoint-{shape}"
    if not holds_checkpoint(path, spec):
        say(f"Writing {path}, random weights")
        write_tiny_checkpoint(path, spec)
    return path
