"""Save a sequence of a cache, and load one into it."""

import json
from dataclasses import asdict
from pathlib import Path

from sglang_dsv4.cache.pages.allocator import NULL_PAGE
from sglang_dsv4.cache.pages.request import Request
from sglang_dsv4.cache.pages.requests import Ledger
from sglang_dsv4.cache.persist.contents import history_shapes, state_shapes, window_shapes
from sglang_dsv4.cache.persist.format import BlobReader, BlobWriter, Manifest
from sglang_dsv4.cache.persist.rows import Transfer
from sglang_dsv4.errors import SavedFileError
from sglang_dsv4.spec import CacheSpec


def save_request(spec: CacheSpec, transfer: Transfer, request: Request, path: Path, extra: dict[str, str]) -> None:
    """Write a settled request; see `CompressedKVCache.save`."""
    pages = request.pages
    try:
        with BlobWriter(path) as writer:
            history = [writer.add(transfer.read_history(request, index)) for index in range(len(pages.history))]
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


def load_request(spec: CacheSpec, ledger: Ledger, transfer: Transfer, path: Path) -> tuple[Request, dict[str, str]]:
    """Read a sequence into fresh pages; see `CompressedKVCache.load`.

    Every blob is read once, checked, and held on the host until all are: as much memory as the sequence takes on disk.
    """
    manifest = Manifest.read(path, spec)
    _check_page_counts(manifest, spec, path)
    reader = BlobReader(path, manifest)
    seq_len, min_len = manifest.seq_len, manifest.min_len
    history = [reader.read(name, history_shapes(spec, seq_len, index)) for index, name in enumerate(manifest.history)]
    window = {
        index: reader.read(name, window_shapes(spec, seq_len, min_len, index))
        for index, name in enumerate(manifest.window)
        if name
    }
    state = reader.read(manifest.state, state_shapes(spec, seq_len, min_len))
    request = ledger.adopt(seq_len, min_len)
    finished = False
    try:
        for index, tensors in enumerate(history):
            transfer.write_history(request, index, tensors)
        for index, tensors in window.items():
            transfer.write_window(request, index, tensors)
        transfer.write_state(request, state)
        finished = True
    finally:
        if not finished:
            ledger.close(request)
    return request, dict(manifest.extra)


def _check_page_counts(manifest: Manifest, spec: CacheSpec, path: Path) -> None:
    seq_len, min_len = manifest.seq_len, manifest.min_len
    if not max(0, seq_len - spec.max_draft_tokens) <= min_len <= seq_len:
        raise SavedFileError(
            f"{path}: expected a sequence that can be cut back by at most {spec.max_draft_tokens} tokens, "
            f"got one of {seq_len} tokens with min_len {min_len}"
        )
    count = -(-seq_len // spec.page_tokens)
    first = spec.first_window_position(min_len) // spec.page_tokens
    held = [index >= first for index in range(count)]
    got = [bool(name) for name in manifest.window]
    if len(manifest.history) != count or got != held:
        raise SavedFileError(
            f"{path}: expected {count} history pages and window pages {held} for {seq_len} tokens, "
            f"got {len(manifest.history)} and {got}"
        )
