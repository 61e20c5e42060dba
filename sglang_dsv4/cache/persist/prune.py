"""Remove pages of saved sequences that no manifest names any more."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_dsv4.cache.persist.format import BLOB_FOLDER, FORMAT, TEMPORARY_PREFIX, TEMPORARY_SUFFIX, VERSION, lock_folder
from sglang_dsv4.errors import SavedFileError


@dataclass(frozen=True)
class Pruned:
    """What `prune_saved` found.

    Attributes:
        sequences (int): manifests in the folder.
        kept_files (int): pages that they name.
        kept_bytes (int): their bytes.
        removed_files (int): files that were, or with ``dry_run`` would be, removed.
        removed_bytes (int): their bytes.
    """

    sequences: int
    kept_files: int
    kept_bytes: int
    removed_files: int
    removed_bytes: int


def prune_saved(folder: Path | str, *, dry_run: bool = False) -> Pruned:
    """Remove what deleted and overwritten sequences have left behind, and the remains of saves that were killed.

    A save in the same folder, also of another process, is waited for, and waits.

    Args:
        folder (Path | str): where the manifests are; their pages are in ``dsv4kv-pages`` below it.
        dry_run (bool): remove nothing.

    Raises:
        SavedFileError: there are no pages here, or a manifest cannot be read, so that nobody knows what it needs;
            nothing was removed.
    """
    folder = Path(folder)
    pages = folder / BLOB_FOLDER
    if not pages.is_dir():
        raise SavedFileError(f"{folder}: expected a folder with {BLOB_FOLDER}, found none")
    lock = lock_folder(pages)
    try:
        return _prune(folder, pages, dry_run)
    finally:
        os.close(lock)


def _prune(folder: Path, pages: Path, dry_run: bool) -> Pruned:
    named: set[str] = set()
    sequences = 0
    for needed in _manifests(folder):
        sequences += 1
        named |= needed
    kept = [path for path in pages.iterdir() if path.stem in named]
    loose = [path for path in pages.iterdir() if path.stem not in named and _is_ours(path)]
    loose += [path for path in folder.iterdir() if _is_temporary(path)]
    found = Pruned(sequences, len(kept), _bytes(kept), removed_files=len(loose), removed_bytes=_bytes(loose))
    if not dry_run:
        for path in loose:
            path.unlink(missing_ok=True)
    return found


def _manifests(folder: Path) -> Iterator[set[str]]:
    """The pages that each manifest names."""
    for path in sorted(folder.iterdir()):
        if not path.is_file() or _is_temporary(path):
            continue
        content = path.read_bytes()
        is_named_so = path.suffix == ".dsv4kv"
        if not is_named_so and not (content.startswith(b"{") and FORMAT.encode() in content):
            continue  # somebody else's file
        try:
            body = json.loads(content)
            if not is_named_so and body.get("format") != FORMAT:
                continue
            version = body["version"]
            names = {*body["history"], *body["window"], body["state"]} - {""}
        except (ValueError, KeyError, TypeError) as error:
            raise SavedFileError(f"{path}: damaged, it cannot be told which pages it needs; nothing was removed") from error
        if version != VERSION:
            raise SavedFileError(f"{path}: expected format version {VERSION}, got {version}; nothing was removed")
        yield names


def _is_ours(path: Path) -> bool:
    return path.suffix == ".safetensors" or _is_temporary(path)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(TEMPORARY_PREFIX) and path.name.endswith(TEMPORARY_SUFFIX)


def _bytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
