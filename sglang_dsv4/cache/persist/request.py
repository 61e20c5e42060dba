"""Save a sequence of a cache, and load one into it."""

import json
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as brief

from sglang_dsv4.cache.pages.request import Request
from sglang_dsv4.cache.pages.requests import Requests
from sglang_dsv4.cache.pages.tables import NULL_PAGE
from sglang_dsv4.cache.persist.format import BlobReader, BlobWriter
from sglang_dsv4.cache.persist.manifest import Manifest, is_text_by_name
from sglang_dsv4.cache.persist.rows import Transfer, shapes_of
from sglang_dsv4.cache.regions import Owner, RegionTable
from sglang_dsv4.errors import SavedFileError
from sglang_dsv4.spec import CacheSpec


def save_request(spec: CacheSpec, transfer: Transfer, request: Request, path: Path, extra: dict[str, str]) -> None:
    """Write a settled request; see `CompressedKVCache.save`."""
    if not is_text_by_name(extra):
        raise TypeError(f"extra: expected strings by name, got {brief(extra)}; nothing was saved")
    pages = request.pages
    try:
        with BlobWriter(path) as writer:
            history = [writer.add(transfer.read(request, Owner.HISTORY_PAGE, index)) for index in range(len(pages.history))]
            window = [
                "" if page == NULL_PAGE else writer.add(transfer.read(request, Owner.WINDOW_PAGE, index))
                for index, page in enumerate(pages.window)
            ]
            manifest = Manifest(
                spec=spec.digest(),
                spec_fields=json.loads(json.dumps(asdict(spec))),
                seq_len=request.seq_len,
                min_len=request.min_len,
                history=history,
                window=window,
                state=writer.add(transfer.read(request, Owner.STATE_SLOT)),
                tensors=writer.tensors,
                extra=extra,
            )
            writer.finish(manifest)
    except OSError as error:
        raise SavedFileError(f"{path}: cannot be written, nothing was saved: {error}") from error


def load_request(spec: CacheSpec, requests: Requests, transfer: Transfer, path: Path) -> Request:
    """Read a sequence into fresh pages; see `CompressedKVCache.load`.

    Every blob is read once, checked, and held on the host until all are: as much memory as the sequence takes on disk.
    """
    manifest = Manifest.read(path, spec)
    table, seq_len, min_len = RegionTable(spec), manifest.seq_len, manifest.min_len
    _check_lengths(manifest, spec, table, path)
    reader = BlobReader(path, manifest)
    names = {Owner.HISTORY_PAGE: manifest.history, Owner.WINDOW_PAGE: manifest.window, Owner.STATE_SLOT: [manifest.state]}
    pieces = [
        (owner, page, reader.read(name, shapes_of(table, owner, seq_len, min_len, page)))
        for owner, blobs in names.items()
        for page, name in enumerate(blobs)
        if name
    ]
    request = requests.adopt(seq_len, min_len)
    finished = False
    try:
        for owner, page, tensors in pieces:
            transfer.write(request, owner, page, tensors)
        request.extra = dict(manifest.extra)
        finished = True
    finally:
        if not finished:
            requests.end(request)
    return request


def _check_lengths(manifest: Manifest, spec: CacheSpec, table: RegionTable, path: Path) -> None:
    seq_len, min_len = manifest.seq_len, manifest.min_len
    pages = table.num_pages(seq_len)
    if (len(manifest.history), len(manifest.window)) != (pages, pages):
        raise SavedFileError(
            f"{path}: expected {brief(pages)} history and window pages for {brief(seq_len)} tokens, got {len(manifest.history)} and "
            f"{len(manifest.window)}"
        )
    if not max(0, seq_len - spec.max_draft_tokens) <= min_len <= seq_len:
        raise SavedFileError(
            f"{path}: expected a sequence that can be cut back by at most {spec.max_draft_tokens} tokens, "
            f"got one of {seq_len} tokens with min_len {brief(min_len)}"
        )
    needed = table.window_pages(seq_len, min_len)
    held = [index for index, name in enumerate(manifest.window) if name]
    if held != list(needed):
        raise SavedFileError(f"{path}: expected window pages {list(needed)} of {pages}, got {brief(held)}")
