"""What is read of a checkpoint before it is loaded."""

import json
from pathlib import Path
from typing import Any

from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.spec import CacheSpec

ARCHITECTURE = "DeepseekV4ForCausalLM"
PAGE_TOKENS = 256
PADDED_HEADS = 64  # SGLang fills the heads of a rank up to this many, for FlashMLA


def read_config(model_path: str, overrides: str | None = None) -> dict[str, Any]:
    """A checkpoint's configuration, as SGLang will have it.

    Args:
        model_path (str): a folder with a ``config.json``.
        overrides (str | None): JSON of fields that replace those of the file, as of ``--json-model-override-args``.

    Raises:
        UnsupportedError: names the path and what was found there.
    """
    config_file = Path(model_path) / "config.json"
    if not config_file.is_file():
        raise UnsupportedError(f"--model-path {model_path}: expected a folder with a config.json, found none")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise UnsupportedError(f"--model-path {model_path}: config.json is not JSON: {error}") from error
    try:
        return {**config, **json.loads(overrides or "{}")}
    except (ValueError, TypeError) as error:
        raise UnsupportedError(f"--json-model-override-args {overrides}: expected a JSON object: {error}") from error


def check_config(config: dict[str, Any], model_path: str, options: dict[str, Any]) -> CacheSpec:
    """Refuse a checkpoint that is not of DeepSeek-V4, or not written as SGLang reads it.

    Args:
        config (dict[str, Any]): of `read_config`.
        model_path (str): where it was read.
        options (dict[str, Any]): row and index format.

    Returns:
        CacheSpec: what the cache will hold.

    Raises:
        UnsupportedError: names the path and what was found there.
    """
    found = config.get("architectures") or ["none"]
    if any("V41" in name for name in found) or config.get("model_type") == "deepseek_v41" or config.get("kv_source_layer_ids"):
        raise UnsupportedError(
            f"--model-path {model_path}: DeepSeek-V4.1 ({', '.join(found)}): not supported; its layers share rows, and compress "
            "by 1 and 2 as well"
        )
    if ARCHITECTURE not in found:
        raise UnsupportedError(f"--model-path {model_path}: expected the architecture {ARCHITECTURE}, got {', '.join(found)}")
    if config.get("compress_ratios") is None:
        raise UnsupportedError(
            f"--model-path {model_path}: config.json has no compress_ratios, which SGLang needs; take the released config.json "
            "(transformers writes layer_types instead)"
        )
    return CacheSpec.from_hf(config, page_tokens=PAGE_TOKENS, **options)


def check_context(config: dict[str, Any], context_length: int | None) -> None:
    """Refuse a context longer than the table of rotations.

    Args:
        config (dict[str, Any]): of `read_config`.
        context_length (int | None): tokens, as of ``--context-length``; None for the model's own.

    Raises:
        UnsupportedError: names both lengths.
    """
    longest = config.get("max_position_embeddings")
    if context_length is not None and longest is not None and context_length > longest:
        raise UnsupportedError(
            f"--context-length {context_length}: expected at most {longest}, the max_position_embeddings of the checkpoint, for "
            f"which RoPE tables are made; --json-model-override-args '{{\"max_position_embeddings\": {context_length}}}' makes "
            "longer ones"
        )


def is_unquantised(config: dict[str, Any]) -> bool:
    """Whether a configuration names no quantisation."""
    return not config.get("quantization_config")


def handed_heads(num_heads: int, tp_size: int) -> int:
    """Query heads that SGLang's model hands to one rank's attention: its own, filled up to 64 or to all of them.

    Args:
        num_heads (int): query heads of the model.
        tp_size (int): ranks that share them.
    """
    if tp_size == 1:
        return num_heads
    return PADDED_HEADS if num_heads // tp_size <= PADDED_HEADS else num_heads
