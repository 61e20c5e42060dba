"""The small file that says what a saved sequence consists of: JSON with its own checksum."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from sglang_dsv4.errors import SavedFileError
from sglang_dsv4.spec import CacheSpec

FORMAT = "sglang-dsv4 saved sequence"
VERSION = 2
_BLOB_NAME = re.compile(r"[0-9a-f]{64}\Z")


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
            SavedFileError: missing, damaged, of another version, or of another spec.
        """
        try:
            content = read_file(path)
        except OSError as error:
            raise SavedFileError(f"{path}: expected a saved sequence, {error}") from error
        found = cls.parse(path, content)
        if found.spec != spec.digest():
            raise SavedFileError(f"{path}: {_spec_difference(found.spec_fields, spec)}")
        return found

    @classmethod
    def parse(cls, path: Path, content: bytes) -> "Manifest":
        """A manifest of any spec; ``path`` names it in messages.

        Raises:
            SavedFileError: damaged, or of another version.
        """
        try:
            body = json.loads(content)
            expected = body.pop("checksum", None) if isinstance(body, dict) else None
            checksum = _checksum(body)
        except (ValueError, RecursionError) as error:
            raise SavedFileError(f"{path}: damaged, it cannot be read as JSON: {error}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise SavedFileError(f"{path}: expected a {FORMAT}, got something else")
        if body.get("version") != VERSION:
            raise SavedFileError(
                f"{path}: expected format version {VERSION}, got {brief(body.get('version'))}; "
                "another version of sglang-dsv4 wrote it"
            )
        if checksum != expected:
            raise SavedFileError(f"{path}: damaged, its checksum does not match")
        for name, (kind, fits) in _FIELDS.items():
            if name not in body:
                raise SavedFileError(f"{path}: expected a field {name!r}, found none")
            if not fits(body[name]):
                raise SavedFileError(f"{path}: {name}: expected {kind}, got {brief(body[name])}")
        return cls(**{name: body[name] for name in _FIELDS})

    def blobs(self) -> set[str]:
        """Every blob the sequence needs."""
        return {name for name in (*self.history, *self.window, self.state) if name}


def read_file(path: Path) -> bytes:
    """A file's bytes. A pipe in its place is not waited for.

    Raises:
        OSError: it is missing, is no regular file, or cannot be read.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file" if path.exists() else "no such file"
        raise OSError(f"found {kind}")
    return path.read_bytes()


def is_text_by_name(value: object) -> bool:
    """Whether it is a dict of strings, which JSON keeps as they are."""
    return isinstance(value, dict) and all(isinstance(text, str) for item in value.items() for text in item)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_blob(value: object) -> bool:
    return isinstance(value, str) and _BLOB_NAME.match(value) is not None


# What each field must be, in words and as a test.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "spec": ("a digest", lambda value: isinstance(value, str)),
    "spec_fields": ("an object", lambda value: isinstance(value, dict)),
    "seq_len": ("a number of tokens", _is_count),
    "min_len": ("a number of tokens", _is_count),
    "history": ("names of pages", lambda value: isinstance(value, list) and all(map(_is_blob, value))),
    "window": ("names of pages", lambda value: isinstance(value, list) and all(name == "" or _is_blob(name) for name in value)),
    "state": ("the name of a page", _is_blob),
    "tensors": ("checksums", lambda value: isinstance(value, dict) and all(map(is_text_by_name, value.values()))),
    "extra": ("strings by name", is_text_by_name),
}


def _checksum(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _spec_difference(saved: dict[str, Any], spec: CacheSpec) -> str:
    mine = json.loads(json.dumps(asdict(spec)))
    for name, value in mine.items():
        if saved.get(name) != value:
            expected, got = (brief(value), brief(saved.get(name))) if name != "layers" else ("the model's", "others")
            return f"of another spec: {name}: expected {expected}, got {got}"
    return "of another spec"
