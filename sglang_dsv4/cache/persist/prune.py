"""Remove pages of saved sequences that no manifest names any more."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_dsv4.cache.persist.format import BLOB_FOLDER, TEMPORARY_PREFIX, TEMPORARY_SUFFIX, lock_folder
from sglang_dsv4.cache.persist.manifest import FORMAT, Manifest
from sglang_dsv4.errors import SavedFileError

MANIFEST_SUFFIX = ".dsv4kv"  # of a file that is ours whatever it holds


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
    lock = -1
    try:
        lock = lock_folder(pages)
        return _prune(folder, pages, dry_run)
    except OSError as error:
        raise SavedFileError(f"{folder}: cannot be pruned: {error}") from error
    finally:
        if lock >= 0:
            os.close(lock)


def _prune(folder: Path, pages: Path, dry_run: bool) -> Pruned:
    manifests = list(_manifests(folder))
    named = {name for manifest in manifests for name in manifest.blobs()}
    files = [path for path in pages.iterdir() if path.is_file()]
    kept = [path for path in files if path.stem in named]
    loose = [path for path in files if path.stem not in named and _is_ours(path)]
    loose += [path for path in folder.iterdir() if path.is_file() and _is_temporary(path)]
    found = Pruned(len(manifests), len(kept), _bytes(kept), removed_files=len(loose), removed_bytes=_bytes(loose))
    if not dry_run:
        for path in loose:
            path.unlink(missing_ok=True)
    return found


def _manifests(folder: Path) -> Iterator[Manifest]:
    """Those in a folder; somebody else's files are passed over."""
    for path in sorted(folder.iterdir()):
        if not path.is_file() or _is_temporary(path):
            continue
        with path.open("rb") as file:
            start = file.read(1)
            content = start + file.read() if start == b"{" or path.suffix == MANIFEST_SUFFIX else b""
        if path.suffix == MANIFEST_SUFFIX or (FORMAT.encode() in content and not _is_of_another_format(content)):
            try:
                yield Manifest.parse(path, content)
            except SavedFileError as error:
                raise SavedFileError(f"{error}; it cannot be told which pages it needs, nothing was removed") from error


def _is_of_another_format(content: bytes) -> bool:
    """Whether it is JSON, whole, that only mentions ours."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return not isinstance(body, dict) or body.get("format") != FORMAT


def _is_ours(path: Path) -> bool:
    return path.suffix == ".safetensors" or _is_temporary(path)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(TEMPORARY_PREFIX) and path.name.endswith(TEMPORARY_SUFFIX)


def _bytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
