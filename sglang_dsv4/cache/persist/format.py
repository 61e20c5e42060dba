"""Pages of sequences on disk.

A saved sequence is a manifest, a small JSON file at the path the user names, and *blobs*, safetensors files in the folder
``dsv4kv-pages`` beside it. A blob is named by the SHA-256 of its bytes: branches of one conversation store their common
pages once. Everything is written under a temporary name, synced, and renamed; the manifest last.
"""

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors

from sglang_dsv4.cache.persist.manifest import Manifest, read_file
from sglang_dsv4.cache.persist.rows import Shapes, Tensors
from sglang_dsv4.errors import SavedFileError

BLOB_FOLDER = "dsv4kv-pages"
TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".dsv4kv-", ".tmp"  # of a file that is not whole yet


class BlobWriter:
    """Writes blobs, and takes back what it wrote if the save does not finish.

    A ``with`` block holds a lock on the blob folder: another save there waits, so that neither takes back what the other
    counts on.

    Args:
        manifest_path (Path): where the manifest will be.
    """

    def __init__(self, manifest_path: Path) -> None:
        self._path = manifest_path
        self._folder = manifest_path.parent / BLOB_FOLDER
        self._new: list[Path] = []
        self._lock = -1
        self.tensors: dict[str, dict[str, str]] = {}

    def __enter__(self) -> "BlobWriter":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        for target in self._new:  # none once the manifest is in place
            target.unlink(missing_ok=True)
        os.close(self._lock)  # releases the lock

    def add(self, tensors: Tensors) -> str:
        """Store tensors unless the same are stored already; returns the blob's name."""
        stored = serialize_tensors({name: tensors[name].contiguous() for name in sorted(tensors)})
        name = hashlib.sha256(stored).hexdigest()
        self.tensors[name] = {key: _tensor_digest(value) for key, value in tensors.items()}
        target = self._folder / f"{name}.safetensors"
        if not target.exists():
            self._new.append(target)
            _put(target, stored)
        elif not target.is_file() or hashlib.sha256(target.read_bytes()).hexdigest() != name:
            _put(target, stored)  # damaged since it was written
        return name

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest; when it is in place the sequence is saved.

        Raises:
            OSError: nothing is in place.
            SavedFileError: the sequence is saved, but the folder could not be synced.
        """
        _sync(self._folder)
        _put(self._path, manifest.to_json().encode())
        self._new.clear()
        try:
            _sync(self._path.parent)
        except OSError as error:
            raise SavedFileError(f"{self._path}: saved, but it may not survive a power cut: {error}") from error


def _tensor_digest(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def _parse(stored: bytes) -> Tensors | None:
    """The tensors of a safetensors file; None of anything else, and of dtypes that torch has not (a KeyError)."""
    try:
        return parse_tensors(stored)
    except (SafetensorError, KeyError):
        return None


def lock_folder(folder: Path) -> int:
    """Wait until nobody else holds the folder; closing the descriptor lets it go."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _put(target: Path, content: bytes) -> None:
    """Write a file so that it is either whole or not there."""
    descriptor, temporary = tempfile.mkstemp(TEMPORARY_SUFFIX, TEMPORARY_PREFIX, target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BlobReader:
    """Reads blobs and checks every byte.

    Args:
        manifest_path (Path): where the manifest is.
        manifest (Manifest): what it says.
    """

    def __init__(self, manifest_path: Path, manifest: Manifest) -> None:
        self._path = manifest_path
        self._manifest = manifest

    def read(self, name: str, shapes: Shapes) -> Tensors:
        """A blob's tensors.

        Args:
            name (str): the blob.
            shapes (Shapes): what it must hold.

        Raises:
            SavedFileError: missing, damaged, or something else; names the file, and the tensor where that can be told.
        """
        target = self._path.parent / BLOB_FOLDER / f"{name}.safetensors"
        try:
            stored = read_file(target)
        except OSError as error:
            raise SavedFileError(f"{self._path}: {target}: expected a page, {error}") from error
        if hashlib.sha256(stored).hexdigest() != name:
            raise SavedFileError(f"{self._path}: {target} is damaged{self._where(name, stored)}")
        tensors = _parse(stored)
        if tensors is None:
            raise SavedFileError(f"{self._path}: {target} is no safetensors file that torch can read")
        got = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
        for key in sorted(shapes.keys() | got.keys()):
            if got.get(key) != shapes.get(key):
                raise SavedFileError(
                    f"{self._path}: {target}: tensor {key:.80}: expected {shapes.get(key, 'none')}, got {got.get(key, 'none')}"
                )
        return tensors

    def _where(self, name: str, stored: bytes) -> str:
        """Which tensor of a damaged blob is wrong, where that can be told."""
        tensors = _parse(stored)
        if tensors is None:
            return f": {len(stored)} bytes that are no safetensors file"
        digests = self._manifest.tensors.get(name, {})
        wrong = [key for key, value in tensors.items() if digests.get(key) != _tensor_digest(value)]
        return f": tensor {wrong[0]}" if wrong else ": in its header"
