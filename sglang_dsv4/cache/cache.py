"""The compressed KV cache as one object."""

from collections.abc import Sequence
from contextlib import ExitStack
from operator import index
from pathlib import Path
from typing import TypeVar

import torch

from sglang_dsv4.cache.choose_kernels import make_kernels
from sglang_dsv4.cache.inspect import integrity
from sglang_dsv4.cache.inspect.report import CacheReport, build_report, report_request
from sglang_dsv4.cache.kernels import LayerMemory
from sglang_dsv4.cache.layer import LayerCache
from sglang_dsv4.cache.pages.allocator import PageAllocator
from sglang_dsv4.cache.pages.request import Request, Snapshot
from sglang_dsv4.cache.pages.requests import Requests
from sglang_dsv4.cache.pages.steps import OwnedSteps
from sglang_dsv4.cache.persist.request import load_request, save_request
from sglang_dsv4.cache.persist.rows import Transfer
from sglang_dsv4.cache.plan import StepPlan
from sglang_dsv4.cache.regions import Owner
from sglang_dsv4.cache.storage import CacheStorage, Capacity
from sglang_dsv4.spec import CacheSpec

CHECK_LEVELS = ("off", "pages", "memory")
Held = TypeVar("Held", Request, Snapshot)


class CompressedKVCache:
    """Window rows, compressed entries, index keys and stream state of many requests.

    A step is ``plan`` (host, may fail, changes nothing), `LayerCache.append` for every part of every layer (device), then
    ``commit`` (host), or ``abandon``, which takes all of it back. Between ``append`` and attention, `LayerCache.select` chooses
    the entries of CSA layers.

    A plan is good as long as its requests stay as they are and the pages it counts on stay free. From its first append on
    it holds its pages: whatever happens to other requests, it can be finished. Its own requests can only be closed then,
    or rewound to a snapshot. No operation harms a step of other requests that is under way.

    An operation that is cut off at any tensor operation, because memory runs out or the user interrupts, changes nothing, with
    three exceptions that the object remembers: an append has to be taken back by ``abandon``; an ``abandon`` and a ``rewind``
    have to be called again, or their requests closed. Until then these requests are refused. If a check that ``checks`` asked
    for fails, what the operation made is gone again, and anything else that it did is done.

    Args:
        spec (CacheSpec): from `CacheSpec.from_hf`.
        num_pages (int): history pages, of ``spec.page_tokens`` tokens each.
        max_requests (int): requests open at once.
        num_window_pages (int | None): window pages; by default as many as history pages, so that a prefill of any length
            fits in one step. Between steps a request holds at most two, and one more for draft tokens.
        device (torch.device | str): where the memory lives.
        checks (str): ``"pages"`` checks the books after every operation that changes them, ``"memory"`` also that all
            a request needs is finite; ``"off"`` leaves it to `check_integrity`.
        kernels (str): ``"triton"`` (a CUDA device), ``"torch"`` (anywhere), or ``"auto"``: Triton where it runs. The two
            round some entries differently, in the last bit of a stored value.

    Attributes:
        layers (tuple[LayerCache, ...]): by layer; what a model's layers write to and attention reads.
        requests (Requests): the books.
        storage (CacheStorage): the tensors.
    """

    def __init__(
        self,
        spec: CacheSpec,
        *,
        num_pages: int,
        max_requests: int,
        num_window_pages: int | None = None,
        device: torch.device | str = "cpu",
        checks: str = "off",
        kernels: str = "auto",
    ) -> None:
        if checks not in CHECK_LEVELS:
            raise ValueError(f"checks: expected one of {CHECK_LEVELS}, got {checks!r}")
        window_pages = num_pages if num_window_pages is None else num_window_pages
        capacity = Capacity(num_pages, window_pages, max_requests, num_pages * spec.page_tokens)
        self.spec = spec
        self.device = torch.device(device)
        self.kernels = make_kernels(kernels, spec, capacity, self.device)
        self.storage = CacheStorage(spec, capacity, self.device)
        self.requests = Requests(self.storage.table, PageAllocator(capacity, self.storage.table))
        self._steps = OwnedSteps(spec, self.requests, self.storage, self.device)
        self.layers = tuple(
            LayerCache(LayerMemory(spec, layer, memory, self.storage.rope_tables[layer.rope]), self.kernels, self._steps)
            for layer, memory in zip(spec.layers, self.storage.layers, strict=True)
        )
        self._checks = checks
        self._bytes_copied = {"fork": 0, "snapshot": 0, "restore": 0}

    def open(self) -> Request:
        """Start an empty sequence.

        Raises:
            OutOfPagesError: every state slot is taken; nothing was changed.
        """
        return self._handed_out(self.requests.open())

    def close(self, held: Request | Snapshot) -> None:
        """End a sequence, or drop a snapshot, and free what it alone holds.

        A step of the sequence that was appended cannot be finished then; ``abandon`` sets its other requests free.

        Raises:
            UnknownRequestError: not open, not taken, or closed already, or another cache's; nothing was changed.
        """
        self.requests.end(held)
        self._after()

    def plan(self, items: Sequence[tuple[Request, int]]) -> StepPlan:
        """Prepare a step; changes nothing.

        Args:
            items (Sequence[tuple[Request, int]]): requests and how many new tokens each gets. The step's tokens are those
                of the first request, then those of the second, and so on.

        Raises:
            OutOfPagesError: not enough pages for all of them together.
            StalePlanError: a request's last plan was appended but not committed.
            DamagedRequestError: a request was left half way.
            UnknownRequestError: a request is not open here.
            ValueError, TypeError: a request twice, or a number of tokens that is negative or no integer.
        """
        return self._steps.plan(items)

    def commit(self, plan: StepPlan) -> None:
        """Make a step's tokens part of their sequences, and free window pages that nothing needs any more.

        Raises:
            StalePlanError: what the plan rests on has changed, or a part of a layer was not appended; nothing was changed.
        """
        self._steps.commit(plan, self.layers)
        self._after()

    def abandon(self, plan: StepPlan) -> None:
        """Take back a step that will not be committed: its requests go on from their committed lengths, exactly.

        For a step that failed, was interrupted, or lost one of its requests half way. A request that got no more tokens than
        ``max_draft_tokens`` can afterwards be rolled back as if they had come and been cut off; any other one as before.
        A plan of which nothing was appended needs no taking back; this does nothing then.

        Raises:
            StalePlanError: it was committed or abandoned, or all its requests are closed; nothing was changed.
        """
        self._steps.abandon(plan)
        self._after()

    def fork(self, request: Request) -> Request:
        """Start a second sequence that continues from the same tokens.

        Pages are shared until one of the two writes; only the stream state is copied.

        Raises:
            OutOfPagesError: every state slot is taken; nothing was changed.
            StalePlanError: the request's last plan was appended but not committed.
            DamagedRequestError, UnknownRequestError: as in `plan`.
        """
        self.requests.check_settled(request)
        slot = self.requests.next_slot()
        for state in self.storage.stream_state:  # into a free slot: nothing is changed until the books are
            state[slot] = state[request.state_slot]
        return self._handed_out(self.requests.open(request), "fork")

    def truncate(self, request: Request, seq_len: int) -> None:
        """Cut a sequence back by draft tokens; moves nothing.

        Args:
            request (Request): the sequence.
            seq_len (int): from ``request.min_len`` (the committed length less ``max_draft_tokens``) to ``request.seq_len``.

        Raises:
            TruncateError: a length out of range; the message names those that are possible.
            StalePlanError, DamagedRequestError, UnknownRequestError: as in `plan`.
        """
        self.requests.shorten(request, index(seq_len))
        self._after()

    def rewind(self, request: Request, snapshot: Snapshot) -> None:
        """Give a sequence the tokens of a snapshot, its own or another request's; the snapshot stays.

        A step of the sequence that was appended cannot be finished then; ``abandon`` sets its other requests free.

        Raises:
            UnknownRequestError: one of the two is not open here; nothing was changed.
        """
        self.requests.check_held(request)
        self.requests.check_held(snapshot)
        request.is_damaged = True  # until its stream state is whole again
        self._put_state(request.state_slot, snapshot)
        self.requests.rewind(request, snapshot)
        self._after("restore")

    def snapshot(self, request: Request, *, pages_only: bool = False) -> Snapshot:
        """Hold on to a sequence as it is now: its pages, shared, and a copy of its stream state.

        Args:
            request (Request): the sequence.
            pages_only (bool): of a sequence that ends at a page boundary, hold only the pages that another one with the same
                tokens needs in order to go on: all history pages, the last window page, and no stream state.

        Raises:
            ValueError: ``pages_only`` of a sequence that does not end at a page boundary.
            StalePlanError, DamagedRequestError, UnknownRequestError: as in `plan`.
        """
        self.requests.check_settled(request)
        if pages_only:
            return self._handed_out(self.requests.keep(request, state=None))
        state = tuple(state[request.state_slot].clone() for state in self.storage.stream_state)
        return self._handed_out(self.requests.keep(request, state), "snapshot")

    def restore(self, snapshot: Snapshot) -> Request:
        """Start a sequence that continues from a snapshot; the snapshot stays.

        Raises:
            OutOfPagesError: every state slot is taken; nothing was changed.
            UnknownRequestError: the snapshot was closed, or is another cache's.
        """
        self.requests.check_held(snapshot)
        self._put_state(self.requests.next_slot(), snapshot)
        return self._handed_out(self.requests.open(snapshot), "restore")

    def save(self, request: Request, path: Path | str, extra: dict[str, str] | None = None) -> None:
        """Write a sequence to disk: the manifest at ``path``, its pages in the folder ``dsv4kv-pages`` beside it.

        Pages that another sequence saved there already are not stored again.

        Args:
            request (Request): the sequence.
            path (Path | str): the manifest; replaced if it exists.
            extra (dict[str, str] | None): small strings to get back from `load`.

        Raises:
            SavedFileError: it cannot be written; what was saved before is as it was, and no new file is left.
            TypeError: ``extra`` holds something else than strings; nothing was saved.
            StalePlanError, DamagedRequestError, UnknownRequestError: as in `plan`.
        """
        self.requests.check_settled(request)
        save_request(self.spec, self._transfer(), request, Path(path), {} if extra is None else extra)

    def load(self, path: Path | str) -> Request:
        """Read a sequence that `save` wrote, also in another process, into a cache of the same spec.

        Args:
            path (Path | str): the manifest.

        Returns:
            Request: a new sequence; what was saved as ``extra`` is its ``extra``.

        Raises:
            SavedFileError: missing, damaged, of a newer format or of another spec; nothing was changed.
            OutOfPagesError: no room; nothing was changed.
        """
        return self._handed_out(load_request(self.spec, self.requests, self._transfer(), Path(path)))

    def report(self) -> CacheReport:
        """Where the bytes are; equal to what is really allocated."""
        books = self.requests
        copies = sum(state.nbytes for taken in books.snapshots for state in taken.state)
        beside = {"snapshots": copies, "undo": self._steps.undo.nbytes, "scratch": self.kernels.nbytes}
        return build_report(
            self.spec,
            self.storage,
            books.allocator.capacity,
            books.allocator.counts(),
            beside,
            self._bytes_copied | self._steps.bytes_copied,
            tuple(report_request(self.spec, self.storage.table, books.allocator, request) for request in books.opened),
        )

    def check_integrity(self, *, memory: bool = False) -> None:
        """Check the invariants of `sglang_dsv4.cache.inspect.integrity`.

        Args:
            memory (bool): also read everything that a request needs, and require it to be finite.

        Raises:
            CacheInvariantError: the message starts with the label of the broken invariant.
        """
        books = self.requests
        integrity.check_pages(self.storage.table, books.allocator, books.opened, books.snapshots, books.grants)
        if memory:
            integrity.check_memory(self.storage, books.opened)

    def _transfer(self) -> Transfer:
        return Transfer(self.storage.table, self.storage.layers)

    def _put_state(self, slot: int, snapshot: Snapshot) -> None:
        if snapshot.state:  # one of pages alone needs none
            for state, kept in zip(self.storage.stream_state, snapshot.state, strict=True):
                state[slot] = kept

    def _handed_out(self, made: Held, copied_state_by: str | None = None) -> Held:
        """`_after` an operation that makes something, which is gone again if a check fails or is interrupted."""
        with ExitStack() as otherwise:
            otherwise.callback(self.requests.end, made)
            self._after(copied_state_by)
            otherwise.pop_all()
        return made

    def _after(self, copied_state_by: str | None = None) -> None:
        """Count a copy of one request's stream state, and check what the user asked to have checked."""
        if copied_state_by is not None:
            self._bytes_copied[copied_state_by] += self.storage.table.bytes_of(Owner.STATE_SLOT)
        self._steps.undo.drop_all_but(self.requests.under_way)
        if self._checks != "off":
            self.check_integrity(memory=self._checks == "memory")
