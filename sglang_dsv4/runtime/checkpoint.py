"""A DeepSeek-V4 checkpoint in this process: transformers' model, and its tokenizer."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm
from transformers.utils import logging

from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.spec import CacheSpec

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}
_MODEL_TYPE = "deepseek_v4"


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` found.

    Attributes:
        name (str): as the user named it.
        model (nn.Module): a `DeepseekV4ForCausalLM`, in evaluation mode on its device.
        tokenizer (Any): transformers' tokenizer; None where the checkpoint has none.
        eos_ids (frozenset[int]): tokens that end a text.
    """

    name: str
    model: Any
    tokenizer: Any
    eos_ids: frozenset[int]


def load_checkpoint(checkpoint: str | Path, device: torch.device, dtype: str | torch.dtype) -> Checkpoint:
    """Load a model and its tokenizer.

    Args:
        checkpoint (str | Path): a directory, or a name that transformers resolves.
        device (torch.device): where the weights go.
        dtype (str | torch.dtype): ``"auto"`` (the checkpoint's), float32 or bfloat16.

    Raises:
        UnsupportedError: not a DeepSeek-V4 checkpoint, or not a whole one.
        ValueError: another dtype.
    """
    name = str(checkpoint)
    wanted = check_dtype(dtype)
    _check_shards(Path(checkpoint))
    # The grouped kernels are made for a GPU; on a CPU a loop over the experts is faster.
    options = {"experts_implementation": "eager"} if device.type == "cpu" else {}
    try:
        with _no_progress_bar():
            model, info = DeepseekV4ForCausalLM.from_pretrained(checkpoint, dtype=wanted, output_loading_info=True, **options)
    except OSError as error:
        raise UnsupportedError(f"{name}: expected the weights of a DeepSeek-V4 model, got: {_first_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            raise UnsupportedError(f"{name}: expected every tensor to load, got {kind}: {sorted(map(str, info[kind]))[:3]}")
    for module in model.modules():
        if isinstance(module, DeepseekV4RMSNorm):
            # transformers keeps these weights in fp32, and their product would meet bf16 matrices.
            module.register_forward_hook(_to_input_dtype)
    model = model.to(device).eval()
    return Checkpoint(name, model, _load_tokenizer(checkpoint), _eos_ids(model))


def check_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """The dtype as transformers takes it.

    Raises:
        ValueError: another one than `load_checkpoint` takes.
    """
    wanted = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted not in _DTYPES.values():
        raise ValueError(f"dtype: expected one of {list(_DTYPES)}, got {dtype!r}")
    return wanted


def load_spec(checkpoint: str | Path, **options: Any) -> CacheSpec:
    """What a checkpoint's cache holds, from its config alone.

    Args:
        checkpoint (str | Path): as for `load_checkpoint`.
        **options (Any): of `CacheSpec.from_hf`.

    Raises:
        UnsupportedError: there is no such checkpoint, or it is not of DeepSeek-V4.
    """
    if not isinstance(checkpoint, (str, Path)):
        raise TypeError(f"checkpoint: expected a folder or a name, got {checkpoint!r}")
    path, name = Path(checkpoint), str(checkpoint)
    if not path.exists() and (name.count("/") != 1 or name.startswith((".", "~", os.sep))):
        raise UnsupportedError(
            f"{name}: expected a folder with a config.json, or a name such as owner/model; found no such folder"
        )
    if path.exists() and not (path / "config.json").is_file():
        raise UnsupportedError(f"{name}: expected a folder with a config.json, found none")
    try:
        found = json.loads((path / "config.json").read_text("utf-8")) if path.exists() else None
        if found is None or found.get("model_type") != _MODEL_TYPE:
            found = AutoConfig.from_pretrained(checkpoint).to_dict()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UnsupportedError(f"{name}: expected a DeepSeek-V4 checkpoint, got: {_first_line(error)}") from error
    if found["model_type"] != _MODEL_TYPE:
        raise UnsupportedError(f"{name}: expected model_type {_MODEL_TYPE!r}, got {found['model_type']!r}")
    return CacheSpec.from_hf(found, **options)


def _check_shards(folder: Path) -> None:
    """Raise unless every file of weights in a folder is whole: its header says how long it is."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UnsupportedError(f"{path}: expected a whole safetensors file, got: {_first_line(error)}") from error


def _load_tokenizer(checkpoint: str | Path) -> Any:
    if Path(checkpoint).is_dir() and not (Path(checkpoint) / "tokenizer.json").exists():
        return None
    return AutoTokenizer.from_pretrained(checkpoint)


def _eos_ids(model: nn.Module) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list) else [found])


def _to_input_dtype(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.to(args[0].dtype)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
