"""Which sequences exist, how long they are, and which pages they hold. Host only; moves no rows."""

from collections.abc import Sequence

import torch

from sglang_dsv4.cache.pages.allocator import PageAllocator
from sglang_dsv4.cache.pages.request import Request, Snapshot
from sglang_dsv4.cache.pages.room import Growth, Held, Room, room_for
from sglang_dsv4.cache.pages.tables import NULL_PAGE, PageGrant, PageList
from sglang_dsv4.cache.plan import PlannedRequest, StepPlan
from sglang_dsv4.cache.regions import Owner, RegionTable
from sglang_dsv4.errors import DamagedRequestError, StalePlanError, TruncateError, UnknownRequestError


class Requests:
    """Requests and snapshots of a cache that owns its pages.

    Every method either does all it says, or raises before it changes anything.

    Attributes:
        allocator (PageAllocator): free and owned pages and slots.
        table (RegionTable): which window pages a sequence needs.
        epoch (int): goes up with every change. A plan is stale when one of its requests changed after the plan's epoch.
        under_way (dict[StepPlan, dict[int, PlannedRequest]]): steps that were appended and neither committed nor abandoned,
            with the requests, by id, that are still part of each; `StepBooks` puts them in.
    """

    def __init__(self, table: RegionTable, allocator: PageAllocator) -> None:
        self.allocator = allocator
        self.table = table
        self.epoch = 0
        self.under_way: dict[StepPlan, dict[int, PlannedRequest]] = {}
        self._requests: dict[int, Request] = {}
        self._snapshots: dict[int, Snapshot] = {}
        self._next_id = 0

    @property
    def opened(self) -> tuple[Request, ...]:
        """Open requests, oldest first."""
        return tuple(self._requests.values())

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """Snapshots not released, oldest first."""
        return tuple(self._snapshots.values())

    @property
    def grants(self) -> tuple[PageGrant, ...]:
        """What steps under way hold for their requests."""
        return tuple(item.grant for items in self.under_way.values() for item in items.values())

    def open(self, like: Request | Snapshot | None = None) -> Request:
        """Start a sequence: an empty one, or over the pages of a settled request or a snapshot.

        Raises:
            OutOfPagesError: every state slot is taken.
        """
        if isinstance(like, Request):
            self.check_settled(like)
        elif like is not None:
            self.check_held(like)
        request = self._open()
        if like is not None:
            request.seq_len, request.min_len = like.seq_len, like.min_len
            request.pages = self.allocator.share(like.pages)
        if isinstance(like, Request):
            self.change(like)  # a plan made before does not know that its last page is shared now
        return request

    def next_slot(self) -> int:
        """The state slot that the next sequence to be opened gets; free until then.

        Raises:
            OutOfPagesError: every state slot is taken.
        """
        return self.allocator.slots.peek(1)[0]

    def adopt(self, seq_len: int, min_len: int) -> Request:
        """Start a sequence of a given length over fresh pages, for rows that come from elsewhere.

        Raises:
            OutOfPagesError: not enough pages or state slots.
        """
        allocator, needed = self.allocator, self.table.window_pages(seq_len, min_len)
        history = allocator.history.peek(needed.stop)
        window = allocator.window.peek(len(needed))
        request = self._open()
        request.seq_len, request.min_len = seq_len, min_len
        allocator.history.take(history)
        allocator.window.take(window)
        request.pages = PageList(list(history), [NULL_PAGE] * needed.start + list(window))
        return request

    def end(self, held: Request | Snapshot) -> None:
        """End a sequence, or drop a snapshot, and release what it holds."""
        self.check_held(held)
        if isinstance(held, Snapshot):
            self.allocator.release(held.pages)
            del self._snapshots[held.snapshot_id]
            self.epoch += 1
            return
        self._withdraw(held)
        self.allocator.release(held.pages)
        self.allocator.slots.release(held.state_slot)
        del self._requests[held.req_id]
        self.change(held)

    def keep(self, request: Request, state: tuple[torch.Tensor, ...] | None) -> Snapshot:
        """Take a snapshot of a settled request that shares its pages; without ``state``, those that a page cut needs.

        Raises:
            ValueError: without ``state``, and the request does not end at a page boundary.
        """
        self.check_settled(request)
        pages, min_len = request.pages, request.min_len
        if state is None:
            history, window = self.table.page_cut(request.seq_len)
            min_len = request.seq_len
            pages = PageList(
                [pages.history[index] for index in history],
                [page if index in window else NULL_PAGE for index, page in enumerate(pages.window)],
            )
        snapshot = Snapshot(
            snapshot_id=self._new_id(),
            req_id=request.req_id,
            seq_len=request.seq_len,
            min_len=min_len,
            pages=self.allocator.share(pages),
            state=state or (),
        )
        self._snapshots[snapshot.snapshot_id] = snapshot
        self.change(request)
        return snapshot

    def room_for(self, growth: Sequence[Growth], without: Held | None = None) -> tuple[Room, Room]:
        """History and window pages that sequences take while they grow, and how many are free; see `Growth`.

        Args:
            growth (Sequence[Growth]): open requests, or sequences that would begin with the pages of others.
            without (Held | None): owners to leave out, such as all entries of a prefix index.
        """
        return room_for(self.table, self.allocator, growth, without or {})

    def num_free(self, owner: Owner) -> int:
        """Free pages of a kind."""
        return len(self.allocator.pool(owner).free)

    def num_owners(self, owner: Owner, page: int) -> int:
        """How many sequences and snapshots hold a page."""
        return self.allocator.pool(owner).owners[page]

    def shorten(self, request: Request, seq_len: int) -> None:
        """Roll a request back by at most the draft tokens.

        Raises:
            TruncateError: names the lengths it could go to.
        """
        self.check_settled(request)
        if not request.min_len <= seq_len <= request.seq_len:
            kept = sorted({s.seq_len for s in self.snapshots if s.req_id == request.req_id})
            raise TruncateError(
                f"{request}: expected a length of {request.min_len} .. {request.seq_len}"
                f"{f', or a snapshot (taken at {kept})' if kept else ''}, got {seq_len}"
            )
        self.allocator.shorten(request.pages, seq_len)
        request.seq_len = seq_len
        self.change(request)

    def rewind(self, request: Request, snapshot: Snapshot) -> None:
        """Give a request the pages and length of a snapshot."""
        self.check_held(request)
        self.check_held(snapshot)
        self._withdraw(request)
        shared = self.allocator.share(snapshot.pages)
        self.allocator.release(request.pages)
        request.pages = shared
        request.seq_len, request.min_len = snapshot.seq_len, snapshot.min_len
        request.is_damaged = False
        self.change(request)

    def change(self, request: Request) -> None:
        """Note that a request changed: plans made before are stale."""
        self.epoch += 1
        request.changed_at = self.epoch

    def check_held(self, held: Request | Snapshot) -> None:
        """Raise unless a request is open here, or a snapshot is kept here."""
        if isinstance(held, Snapshot):
            if self._snapshots.get(held.snapshot_id) is not held:
                raise UnknownRequestError(f"{held}: expected a snapshot taken by this cache and not released")
        elif self._requests.get(held.req_id) is not held:
            raise UnknownRequestError(f"{held}: expected a request opened by this cache and not closed")

    def check_settled(self, request: Request) -> None:
        """Raise unless the request is open here, whole, and no appended plan of it waits for its commit."""
        self.check_held(request)
        check_whole(request)
        if self._step_of(request) is not None:
            raise StalePlanError(f"{request}: its last plan was appended; expected commit, abandon or close first")

    def _open(self) -> Request:
        slots = self.allocator.slots.peek(1)
        self.allocator.slots.take(slots)
        request = Request(self._new_id(), slots[0])
        self._requests[request.req_id] = request
        self.change(request)
        return request

    def _new_id(self) -> int:
        """A number that this cache has not used for a request or snapshot."""
        self._next_id += 1
        return self._next_id - 1

    def _step_of(self, request: Request) -> StepPlan | None:
        return next((plan for plan, items in self.under_way.items() if request.req_id in items), None)

    def _withdraw(self, request: Request) -> None:
        """Take a request out of the step that is being appended, if it is in one; the step cannot be finished then."""
        plan = self._step_of(request)
        if plan is not None:
            self.allocator.withdraw(self.under_way[plan].pop(request.req_id).grant)
            if not self.under_way[plan]:
                del self.under_way[plan]


def check_whole(request: Request) -> None:
    """Raise unless the request's stream state is of its length."""
    if request.is_damaged:
        raise DamagedRequestError(
            f"{request}: a rewind that failed left its stream state half written; expected rewind or close first"
        )
