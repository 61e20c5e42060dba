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
        window_pages (list[int]): its window pages, in order; those before its window may be anything.
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


@dataclass(frozen=True)
class Dump:
    """What `read_dump` found; the fields are what `write_dump` was given, and the message of the finding."""

    message: str
    finding: Finding
    sequences: list[SequenceFacts]
    facts: dict[str, Any]


def read_dump(path: Path) -> Dump:
    """Read what `write_dump` wrote.

    Raises:
        SavedFileError: missing, damaged, or something else.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file" if path.exists() else "no file of that name"
        raise SavedFileError(f"{path}: expected an {KIND}, found {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                found = metadata.get("kind", "another safetensors file")
                raise SavedFileError(f"{path}: expected an {KIND}, got {found:.80}")
            header = json.loads(metadata["dump"])
            tensors = {name: file.get_tensor(name) for name in ("rows", "values")}
        return Dump(
            message=header["message"],
            finding=Finding(**header["finding"], **tensors),
            sequences=[SequenceFacts(**sequence) for sequence in header["sequences"]],
            facts=dict(header["facts"]),
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SavedFileError(f"{path}: expected an {KIND}, got something that cannot be read: {error}") from error
