"""What a failed check leaves behind: one safetensors file, whose header says what happened."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sglang_dsv4.cache.inspect.checksums import Finding
from sglang_dsv4.errors import SavedFileError

KIND = "sglang-dsv4 integrity dump"


@dataclass(frozen=True)
class SequenceFacts:
    """One sequence of the step that was checked.

    Attributes:
        name (str): the request's id.
        seq_len (int): its tokens.
        state_slot (int): its row in the stream state.
        history_pages (list[int]): its pages, in order.
        window_pages (list[int]): likewise; pages before its window may be anything.
    """

    name: str
    seq_len: int
    state_slot: int
    history_pages: list[int]
    window_pages: list[int]


def write_dump(path: Path, finding: Finding, sequences: list[SequenceFacts], facts: dict[str, Any]) -> None:
    """Write a dump.

    Args:
        path (Path): the file.
        finding (Finding): what is broken.
        sequences (list[SequenceFacts]): of the step.
        facts (dict[str, Any]): about the cache: formats, level of checking.

    Raises:
        SavedFileError: it cannot be written.
    """
    tensors = {"rows": finding.rows.cpu().contiguous(), "values": finding.values.cpu().contiguous()}
    plain = {name: value for name, value in vars(finding).items() if not isinstance(value, torch.Tensor)}
    header = {
        "message": finding.message(sequences[finding.owner].name),
        "finding": plain,
        "sequences": [vars(sequence) for sequence in sequences],
        "facts": facts,
    }
    try:
        save_file(tensors, path, metadata={"kind": KIND, "dump": json.dumps(header)})
    except (OSError, SafetensorError) as error:
        raise SavedFileError(f"{path}: expected to write an {KIND}, got {error}") from error


def read_dump(path: Path) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The header, the rows' numbers and their values.

    Raises:
        SavedFileError: missing, damaged, or something else.
    """
    if not path.is_file():
        raise SavedFileError(f"{path}: expected an {KIND}, found no file of that name")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                found = metadata.get("kind", "another safetensors file")
                raise SavedFileError(f"{path}: expected an {KIND}, got {found}")
            return (json.loads(metadata["dump"]), file.get_tensor("rows"), file.get_tensor("values"))
    except (OSError, SafetensorError) as error:
        raise SavedFileError(f"{path}: expected an {KIND}, got {error}") from error
