"""Which sequences exist, how long they are, and which pages they hold. Host only; moves no rows."""

from collections.abc import Iterable, Sequence

from sglang_dsv4.cache.pages import NULL_PAGE, PageAllocator, PageList
from sglang_dsv4.cache.plan import PlannedRequest
from sglang_dsv4.cache.request import Request, Snapshot
from sglang_dsv4.errors import StalePlanError, TruncateError, UnknownRequestError
from sglang_dsv4.spec import CacheSpec


class Ledger:
    """Requests and snapshots of a cache that owns its pages.

    Every method either does all it says, or raises before it changes anything.

    Attributes:
        epoch (int): goes up with every change that makes earlier plans stale.
    """

    def __init__(self, spec: CacheSpec, allocator: PageAllocator) -> None:
        self.spec = spec
        self.allocator = allocator
        self.epoch = 0
        self._requests: dict[int, Request] = {}
        self._snapshots: dict[int, Snapshot] = {}
        self._unfinished: set[int] = set()  # requests of a plan that was appended but not committed
        self._next_id = 0

    @property
    def requests(self) -> tuple[Request, ...]:
        """Open requests, oldest first."""
        return tuple(self._requests.values())

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """Snapshots not released, oldest first."""
        return tuple(self._snapshots.values())

    def new_id(self) -> int:
        """A number that this cache has not used for a request or snapshot."""
        self._next_id += 1
        return self._next_id - 1

    def open(self, seq_len: int = 0, min_len: int = 0, shared: PageList | None = None) -> Request:
        """Start a sequence, over the pages of another if ``shared`` is given.

        Raises:
            OutOfPagesError: every state slot is taken.
        """
        slot = self.allocator.slots.peek(0, 1)
        self.allocator.slots.take(slot)
        request = Request(self.new_id(), slot[0])
        request.seq_len, request.min_len = seq_len, min_len
        if shared is not None:
            request.pages = self.allocator.share(shared)
        self._requests[request.req_id] = request
        self.epoch += 1
        return request

    def adopt(self, seq_len: int, min_len: int) -> Request:
        """Start a sequence of a given length over fresh pages, for rows that come from elsewhere.

        Raises:
            OutOfPagesError: not enough pages or state slots.
        """
        allocator, page_tokens = self.allocator, self.spec.page_tokens
        count = -(-seq_len // page_tokens)
        first = self.spec.first_window_position(min_len) // page_tokens
        history = allocator.history.peek(0, count)
        window = allocator.window.peek(0, count - min(first, count))
        request = self.open(seq_len, min_len)
        allocator.history.take(history)
        allocator.window.take(window)
        request.pages = PageList(list(history), [NULL_PAGE] * (count - len(window)) + list(window))
        return request

    def close(self, request: Request) -> None:
        """End a sequence and release what it holds."""
        self.check_open(request)
        self.allocator.release(request.pages)
        self.allocator.slots.release(request.state_slot)
        del self._requests[request.req_id]
        self._unfinished.discard(request.req_id)
        self.epoch += 1

    def keep(self, snapshot: Snapshot) -> None:
        """Take a snapshot into the books; its pages are shared already."""
        self._snapshots[snapshot.snapshot_id] = snapshot
        self.epoch += 1

    def release(self, snapshot: Snapshot) -> None:
        """Drop a snapshot and release what it holds."""
        self.check_kept(snapshot)
        self.allocator.release(snapshot.pages)
        del self._snapshots[snapshot.snapshot_id]
        self.epoch += 1

    def grant(self, items: Sequence[tuple[Request, int]]) -> tuple[PlannedRequest, ...]:
        """What each request takes when it grows by so many tokens; changes nothing."""
        for request, num_new_tokens in items:
            self.check_settled(request)
            if num_new_tokens < 0:
                raise ValueError(f"{request}: expected 0 or more new tokens, got {num_new_tokens}")
        if len({request.req_id for request, _ in items}) != len(items):
            ids = [request.req_id for request, _ in items]
            raise ValueError(f"plan: expected each request once, got {ids}")
        grants = self.allocator.grant(
            [(request.pages, request.seq_len, request.seq_len + new) for request, new in items]
        )
        return tuple(
            PlannedRequest(request, new, grant)
            for (request, new), grant in zip(items, grants, strict=True)
        )

    def begin(self, items: Iterable[PlannedRequest]) -> None:
        """Note that rows of these requests are being written."""
        self._unfinished.update(item.request.req_id for item in items)

    def commit(self, items: Sequence[PlannedRequest]) -> None:
        """Take the granted pages and grow the requests, then release window pages that no query can reach."""
        self.allocator.take([(item.request.pages, item.grant) for item in items])
        for item in items:
            request = item.request
            request.seq_len += item.num_new_tokens
            request.min_len = max(request.min_len, request.seq_len - self.spec.max_draft_tokens)
            self._unfinished.discard(request.req_id)
        for item in items:
            first = self.spec.first_window_position(item.request.min_len)
            self.allocator.release_window(item.request.pages, first)
        self.epoch += 1

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
        self.epoch += 1

    def rewind(self, request: Request, snapshot: Snapshot) -> None:
        """Give a request the pages and length of a snapshot."""
        self.check_open(request)
        self.check_kept(snapshot)
        shared = self.allocator.share(snapshot.pages)
        self.allocator.release(request.pages)
        request.pages = shared
        request.seq_len, request.min_len = snapshot.seq_len, snapshot.min_len
        self._unfinished.discard(request.req_id)
        self.epoch += 1

    def check_open(self, request: Request) -> None:
        """Raise unless the request is open here."""
        if self._requests.get(request.req_id) is not request:
            raise UnknownRequestError(
                f"{request}: expected a request opened by this cache and not closed"
            )

    def check_settled(self, request: Request) -> None:
        """Raise unless the request is open here and no appended plan of it waits for its commit."""
        self.check_open(request)
        if request.req_id in self._unfinished:
            raise StalePlanError(
                f"{request}: its last plan was appended; expected commit or close first"
            )

    def check_kept(self, snapshot: Snapshot) -> None:
        """Raise unless the snapshot was taken here and not released."""
        if self._snapshots.get(snapshot.snapshot_id) is not snapshot:
            raise UnknownRequestError(
                f"{snapshot}: expected a snapshot taken by this cache and not released"
            )

    def check_epoch(self, epoch: int) -> None:
        """Raise unless a plan of this epoch is still current."""
        if epoch != self.epoch:
            raise StalePlanError(
                f"plan: expected one made at epoch {self.epoch}, got one of epoch {epoch}"
            )
