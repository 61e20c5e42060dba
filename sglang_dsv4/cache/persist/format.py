"""Sequences on disk.

A saved sequence is a manifest, a small JSON file at the path the user names, and *blobs*, safetensors files in the folder
``dsv4kv-pages`` beside it. A blob is named by the SHA-256 of its bytes: branches of one conversation store their common
pages once. Everything is written under a temporary name, synced, and renamed; the manifest last.
"""

import fcntl
import hashlib
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors

from sglang_dsv4.cache.persist.rows import Shapes, Tensors
from sglang_dsv4.errors import SavedFileError
from sglang_dsv4.spec import CacheSpec

FORMAT = "sglang-dsv4 saved sequence"
VERSION = 2
BLOB_FOLDER = "dsv4kv-pages"
TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".dsv4kv-", ".tmp"  # of a file that is not whole yet
_BLOB_NAME = re.compile(r"([0-9a-f]{64})?\Z")  # empty: a page that is not held


@dataclass(frozen=True)
class Manifest:
    """What the JSON file says.

    Attributes:
        spec (str): digest of the cache's spec.
        spec_fields (dict[str, Any]): the spec itself, so that a mismatch can be named.
        seq_len (int): tokens.
        min_len (int): as in `sglang_dsv4.cache.Request`.
        history (list[str]): blob of each history page.
        window (list[str]): blob of each window page, empty where none is held.
        state (str): blob of the stream state.
        tensors (dict[str, dict[str, str]]): SHA-256 of every tensor's bytes, by blob and name.
        extra (dict[str, str]): the user's own.
    """

    spec: str
    spec_fields: dict[str, Any]
    seq_len: int
    min_len: int
    history: list[str]
    window: list[str]
    state: str
    tensors: dict[str, dict[str, str]]
    extra: dict[str, str]

    def to_json(self) -> str:
        """The file's text, with its own checksum."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True)

    @classmethod
    def read(cls, path: Path, spec: CacheSpec) -> "Manifest":
        """Read and check a manifest.

        Raises:
            SavedFileError: missing, damaged, of a newer version, or of another spec.
        """
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise SavedFileError(f"{path}: expected a saved sequence, found no such file") from error
        except (ValueError, OSError) as error:
            raise SavedFileError(f"{path}: damaged, it cannot be read as JSON: {error}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise SavedFileError(f"{path}: expected a {FORMAT}, got something else")
        if body.get("version") != VERSION:
            raise SavedFileError(
                f"{path}: expected format version {VERSION}, got {body.get('version')}; another version of sglang-dsv4 wrote it"
            )
        checksum = body.pop("checksum", None)
        if checksum != _checksum(body):
            raise SavedFileError(f"{path}: damaged, its checksum does not match")
        found = cls._of_fields(body, path)
        if found.spec != spec.digest():
            raise SavedFileError(f"{path}: {_spec_difference(found.spec_fields, spec)}")
        return found

    @classmethod
    def _of_fields(cls, body: dict[str, Any], path: Path) -> "Manifest":
        """Check the fields that `load` computes with; ``extra`` and the rest are only passed on."""
        for name in cls.__dataclass_fields__:
            if name not in body:
                raise SavedFileError(f"{path}: expected a field {name!r}, found none")
        names = [body["state"]]
        for pages in (body["history"], body["window"]):
            names += pages if isinstance(pages, list) else [pages]
        wrong = [name for name in names if not (isinstance(name, str) and _BLOB_NAME.match(name))]
        if wrong:
            raise SavedFileError(f"{path}: expected names of pages, got {wrong[0]!r}")
        for name in ("seq_len", "min_len"):
            if type(body[name]) is not int or body[name] < 0:
                raise SavedFileError(f"{path}: {name}: expected a number of tokens, got {body[name]!r}")
        return cls(**{name: body[name] for name in cls.__dataclass_fields__})

    def blobs(self) -> set[str]:
        """Every blob the sequence needs."""
        return {name for name in (*self.history, *self.window, self.state) if name}


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _spec_difference(saved: dict[str, Any], spec: CacheSpec) -> str:
    mine = json.loads(json.dumps(asdict(spec)))
    for name, value in mine.items():
        if saved.get(name) != value:
            expected, got = (value, saved.get(name)) if name != "layers" else ("the model's", "others")
            return f"of another spec: {name}: expected {expected}, got {got}"
    return "of another spec"


def _tensor_digest(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


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
        elif hashlib.sha256(target.read_bytes()).hexdigest() != name:
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
            stored = target.read_bytes()
        except FileNotFoundError as error:
            raise SavedFileError(f"{self._path}: page missing: expected {target}") from error
        except OSError as error:
            raise SavedFileError(f"{self._path}: {target} cannot be read: {error}") from error
        if hashlib.sha256(stored).hexdigest() != name:
            raise SavedFileError(f"{self._path}: {target} is damaged{self._where(name, stored)}")
        try:
            tensors = parse_tensors(stored)
        except SafetensorError as error:
            raise SavedFileError(f"{self._path}: {target} is no safetensors file") from error
        got = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
        for key in sorted(shapes.keys() | got.keys()):
            if got.get(key) != shapes.get(key):
                raise SavedFileError(
                    f"{self._path}: {target}: tensor {key}: expected {shapes.get(key, 'none')}, got {got.get(key, 'none')}"
                )
        return tensors

    def _where(self, name: str, stored: bytes) -> str:
        """Which tensor of a damaged blob is wrong, where that can be told."""
        try:
            tensors = parse_tensors(stored)
        except SafetensorError:
            return f": {len(stored)} bytes that are no safetensors file"
        digests = self._manifest.tensors.get(name, {})
        wrong = [key for key, value in tensors.items() if digests.get(key) != _tensor_digest(value)]
        return f": tensor {wrong[0]}" if wrong else ": in its header"
