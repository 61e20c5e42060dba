"""Write a tiny checkpoint directory."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sglang_dsv4.tiny.spec import TinySpec
from sglang_dsv4.tiny.tokenizer import write_tokenizer
from sglang_dsv4.tiny.weights import draw_weights

MANIFEST = "sglang_dsv4_tiny.json"
WEIGHTS = "model.safetensors"
# Raised whenever the same spec gives other files.
FORMAT_VERSION = 2


def write_tiny_checkpoint(path: Path, spec: TinySpec) -> None:
    """Write a random-weight DeepSeek-V4 checkpoint that SGLang and transformers load.

    The manifest is written last, so that a directory with a manifest is complete.

    Args:
        path (Path): made if missing. A directory written by this function before is overwritten.
        spec (TinySpec): what to write.

    Raises:
        FileExistsError: the directory holds something else; nothing was changed.
        NotADirectoryError: ``path`` is a file.
    """
    _claim(path)
    path.mkdir(parents=True, exist_ok=True)
    manifest = path / MANIFEST
    # A marker first: a run that is interrupted leaves a directory that the next run may overwrite.
    manifest.write_text("{}\n", encoding="utf-8")
    tensors = draw_weights(spec)
    save_file(tensors, str(path / WEIGHTS), metadata={"format": "pt"})
    _write_json(path / "model.safetensors.index.json", _index(tensors))
    _write_json(path / "config.json", spec.config())
    _write_json(path / "generation_config.json", spec.generation_config())
    write_tokenizer(path)
    _write_json(manifest, manifest_of(spec))


def holds_checkpoint(path: Path, spec: TinySpec) -> bool:
    """Whether ``path`` holds a complete checkpoint of exactly ``spec``, written by this version."""
    manifest = path / MANIFEST
    return manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")) == manifest_of(spec)


def manifest_of(spec: TinySpec) -> dict[str, Any]:
    """What the manifest of a complete checkpoint of ``spec`` says."""
    fields = asdict(spec) | {"compress_ratios": list(spec.compress_ratios)}
    return {"format_version": FORMAT_VERSION, "torch": torch.__version__, "spec": fields}


def _claim(path: Path) -> None:
    """Refuse a directory that is neither empty nor ours."""
    if not path.exists():
        return
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a directory to write the checkpoint to, got a file")
    found = sorted(entry.name for entry in path.iterdir())
    if found and MANIFEST not in found:
        raise FileExistsError(
            f"{path}: expected an empty directory or an earlier tiny checkpoint (one with {MANIFEST}), "
            f"got one that holds {', '.join(found[:3])}{' and more' if len(found) > 3 else ''}"
        )


def _index(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(sorted(tensors), WEIGHTS)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
