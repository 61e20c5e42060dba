"""Operations on whole sequences: open, cut, keep, save and load them."""

from operator import index
from pathlib import Path

import torch

from sglang_dsv4.cache.pages.allocator import PageOwner
from sglang_dsv4.cache.pages.request import Request, Snapshot
from sglang_dsv4.cache.pages.requests import Ledger
from sglang_dsv4.cache.persist import request as archive
from sglang_dsv4.cache.persist.rows import Transfer
from sglang_dsv4.cache.storage import CacheStorage
from sglang_dsv4.spec import CacheSpec


class CacheSequences:
    """The half of `CompressedKVCache` that works between steps; the other half is the steps.

    No operation harms a step of other requests that is being appended.
    """

    spec: CacheSpec
    pages: PageOwner
    storage: CacheStorage
    _ledger: Ledger | None
    _transfer: Transfer

    @property
    def ledger(self) -> Ledger:
        """The books of a cache that owns its pages.

        Raises:
            TypeError: somebody else owns them.
        """
        if self._ledger is None:
            raise TypeError(f"expected a cache that owns its pages, got one over {type(self.pages).__name__}")
        return self._ledger

    def open(self) -> Request:
        """Start an empty sequence.

        Raises:
            OutOfPagesError: every state slot is taken; nothing was changed.
        """
        request = self.ledger.open()
        self._after()
        return request

    def close(self, request: Request) -> None:
        """End a sequence and free what it alone holds.

        A step of it that was appended cannot be finished then; `CompressedKVCache.abandon` sets its other requests free.

        Raises:
            UnknownRequestError: not open here.
        """
        self.ledger.close(request)
        self._after()

    def fork(self, request: Request) -> Request:
        """Start a second sequence that continues from the same tokens.

        Pages are shared until one of the two writes; only the stream state is copied.

        Raises:
            OutOfPagesError: every state slot is taken; nothing was changed.
            StalePlanError: the request's last plan was appended but not committed.
        """
        twin = self.ledger.fork(request)
        for state in self._stream_state():
            state[twin.state_slot] = state[request.state_slot]
        self._after("fork")
        return twin

    def truncate(self, request: Request, to: int | Snapshot) -> None:
        """Cut a sequence back.

        Args:
            request (Request): the sequence.
            to (int | Snapshot): a length from ``request.min_len`` (the committed length less ``max_draft_tokens``) to
                ``request.seq_len``, which moves nothing; or a snapshot, also one of another request.

        Raises:
            TruncateError: a length out of range; the message names those that are possible.
            StalePlanError, UnknownRequestError: as in `plan`.
        """
        if not isinstance(to, Snapshot):
            self.ledger.shorten(request, index(to))
            self._after()
            return
        self.ledger.rewind(request, to)
        self._put_state(request, to)
        self._after("restore")

    def snapshot(self, request: Request) -> Snapshot:
        """Hold on to a sequence as it is now: its pages, shared, and a copy of its stream state.

        Raises:
            StalePlanError, UnknownRequestError: as in `plan`.
        """
        self.ledger.check_settled(request)
        state = tuple(state[request.state_slot].clone() for state in self._stream_state())
        taken = self.ledger.keep(request, request.pages, request.min_len, state)
        self._after("snapshot")
        return taken

    def restore(self, snapshot: Snapshot) -> Request:
        """Start a sequence that continues from a snapshot; the snapshot stays.

        Raises:
            OutOfPagesError: every state slot is taken; nothing was changed.
            UnknownRequestError: the snapshot was released, or is another cache's.
        """
        self.ledger.check_kept(snapshot)
        request = self.ledger.open(snapshot.seq_len, snapshot.min_len, snapshot.pages)
        self._put_state(request, snapshot)
        self._after("restore")
        return request

    def release(self, snapshot: Snapshot) -> None:
        """Drop a snapshot and free what it alone holds.

        Raises:
            UnknownRequestError: the snapshot was released already, or is another cache's.
        """
        self.ledger.release(snapshot)
        self._after()

    def save(self, request: Request, path: Path | str, extra: dict[str, str] | None = None) -> None:
        """Write a sequence to disk: the manifest at ``path``, its pages in the folder ``dsv4kv-pages`` beside it.

        Pages that another sequence saved there already are not stored again.

        Args:
            request (Request): the sequence.
            path (Path | str): the manifest; replaced if it exists.
            extra (dict[str, str] | None): small strings to get back from `load`.

        Raises:
            SavedFileError: it cannot be written; what was saved before is as it was, and no new file is left.
            StalePlanError, UnknownRequestError: as in `plan`.
        """
        self.ledger.check_settled(request)
        archive.save_request(self.spec, self._transfer, request, Path(path), dict(extra or {}))

    def load(self, path: Path | str) -> tuple[Request, dict[str, str]]:
        """Read a sequence that `save` wrote, also in another process, into a cache of the same spec.

        Args:
            path (Path | str): the manifest.

        Returns:
            tuple[Request, dict[str, str]]: a new sequence, and what was saved as ``extra``.

        Raises:
            SavedFileError: missing, damaged, of a newer format or of another spec; nothing was changed.
            OutOfPagesError: no room; nothing was changed.
        """
        loaded = archive.load_request(self.spec, self.ledger, self._transfer, Path(path))
        self._after()
        return loaded

    def _stream_state(self) -> list[torch.Tensor]:
        return [state for layer in self.storage.layers for state in layer.tensors()["stream_state"]]

    def _put_state(self, request: Request, snapshot: Snapshot) -> None:
        for state, kept in zip(self._stream_state(), snapshot.state, strict=True):
            state[request.state_slot] = kept

    def _after(self, copied_state_by: str | None = None) -> None:
        """Called when an operation has changed the books."""
        raise NotImplementedError
