"""Save a sequence of a cache, and load one into it."""

import json
from dataclasses import asdict
from pathlib import Path

from sglang_dsv4.cache.ledger import Ledger
from sglang_dsv4.cache.pages import NULL_PAGE
from sglang_dsv4.cache.request import Request
from sglang_dsv4.cache.saved import BlobReader, BlobWriter, Manifest
from sglang_dsv4.cache.transfer import Transfer
from sglang_dsv4.errors import SavedFileError
from sglang_dsv4.spec import CacheSpec


def save_request(
    spec: CacheSpec, transfer: Transfer, request: Request, path: Path, extra: dict[str, str]
) -> None:
    """Write a settled request; see `CompressedKVCache.save`."""
    pages = request.pages
    try:
        with BlobWriter(path) as writer:
            history = [
                writer.add(transfer.read_history(request, index))
                for index in range(len(pages.history))
            ]
            window = [
                "" if page == NULL_PAGE else writer.add(transfer.read_window(request, index))
                for index, page in enumerate(pages.window)
            ]
            manifest = Manifest(
                spec=spec.digest(),
                spec_fields=json.loads(json.dumps(asdict(spec))),
                seq_len=request.seq_len,
                min_len=request.min_len,
                history=history,
                window=window,
                state=writer.add(transfer.read_state(request)),
                tensors=writer.tensors,
                extra=extra,
            )
            writer.finish(manifest)
    except OSError as error:
        raise SavedFileError(f"{path}: cannot be written, nothing was saved: {error}") from error


def load_request(
    spec: CacheSpec, ledger: Ledger, transfer: Transfer, path: Path
) -> tuple[Request, dict[str, str]]:
    """Read a sequence into fresh pages; see `CompressedKVCache.load`."""
    manifest = Manifest.read(path, spec)
    _check_page_counts(manifest, spec, path)
    reader = BlobReader(path, manifest)
    for name in sorted(manifest.blobs()):  # every byte, before anything is changed
        reader.read(name)
    request = ledger.adopt(manifest.seq_len, manifest.min_len)
    finished = False
    try:
        for index, name in enumerate(manifest.history):
            transfer.write_history(request, index, reader.read(name))
        for index, name in enumerate(manifest.window):
            if name:
                transfer.write_window(request, index, reader.read(name))
        transfer.write_state(request, reader.read(manifest.state))
        finished = True
    finally:
        if not finished:
            ledger.close(request)
    return request, dict(manifest.extra)


def _check_page_counts(manifest: Manifest, spec: CacheSpec, path: Path) -> None:
    count = -(-manifest.seq_len // spec.page_tokens)
    first = spec.first_window_position(manifest.min_len) // spec.page_tokens
    held = [index >= first for index in range(count)]
    got = [bool(name) for name in manifest.window]
    if len(manifest.history) != count or got != held:
        raise SavedFileError(
            f"{path}: expected {count} history pages and window pages {held} for {manifest.seq_len} tokens, "
            f"got {len(manifest.history)} and {got}"
        )
