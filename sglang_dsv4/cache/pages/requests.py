"""Which sequences exist, how long they are, and which pages they hold. Host only; moves no rows."""

from collections.abc import Collection, Sequence

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
        epoch (int): goes up with every change. A plan is stale when one of its requests changed after the plan's epoch.
    """

    def __init__(self, table: RegionTable, max_draft_tokens: int, allocator: PageAllocator) -> None:
        self.allocator = allocator
        self._table = table
        self._max_draft_tokens = max_draft_tokens
        self.epoch = 0
        self._requests: dict[int, Request] = {}
        self._snapshots: dict[int, Snapshot] = {}
        # Steps appended and not over, with the requests that are still part of each.
        self._steps: dict[StepPlan, dict[int, PlannedRequest]] = {}
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
    def steps(self) -> Collection[StepPlan]:
        """Plans that were appended and neither committed nor abandoned."""
        return self._steps.keys()

    @property
    def grants(self) -> tuple[PageGrant, ...]:
        """What these hold for their requests."""
        return tuple(item.grant for items in self._steps.values() for item in items.values())

    def open(self, seq_len: int = 0, min_len: int = 0, shared: PageList | None = None) -> Request:
        """Start a sequence, over the pages of another if ``shared`` is given.

        Raises:
            OutOfPagesError: every state slot is taken.
        """
        slot = self.allocator.slots.peek(1)
        self.allocator.slots.take(slot)
        request = Request(self._new_id(), slot[0])
        request.seq_len, request.min_len = seq_len, min_len
        if shared is not None:
            request.pages = self.allocator.share(shared)
        self._requests[request.req_id] = request
        self._change(request)
        return request

    def fork(self, request: Request) -> Request:
        """Start a sequence over a settled request's pages.

        Raises:
            OutOfPagesError: every state slot is taken.
        """
        self.check_settled(request)
        twin = self.open(request.seq_len, request.min_len, request.pages)
        self._change(request)  # a plan made before does not know that its last page is shared now
        return twin

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
        allocator, needed = self.allocator, self._table.window_pages(seq_len, min_len)
        history = allocator.history.peek(needed.stop)
        window = allocator.window.peek(len(needed))
        request = self.open(seq_len, min_len)
        allocator.history.take(history)
        allocator.window.take(window)
        request.pages = PageList(list(history), [NULL_PAGE] * needed.start + list(window))
        return request

    def close(self, request: Request) -> None:
        """End a sequence and release what it holds."""
        self.check_open(request)
        self._withdraw(request)
        self.allocator.release(request.pages)
        self.allocator.slots.release(request.state_slot)
        del self._requests[request.req_id]
        self._change(request)

    def keep(self, request: Request, state: tuple[torch.Tensor, ...]) -> Snapshot:
        """Take a snapshot of a settled request that shares its pages."""
        return self._keep(request, request.pages, request.min_len, state)

    def keep_page_cut(self, request: Request) -> Snapshot:
        """Take a snapshot of a settled request that ends at a page boundary: of the pages that a cut there needs, no state.

        Raises:
            ValueError: it ends elsewhere.
        """
        history, window = self._table.page_cut(request.seq_len)
        pages = PageList(
            [request.pages.history[index] for index in history],
            [page if index in window else NULL_PAGE for index, page in enumerate(request.pages.window)],
        )
        return self._keep(request, pages, request.seq_len, ())

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
        grants = self.allocator.grant([(request.pages, request.seq_len, request.seq_len + new) for request, new in items])
        return tuple(PlannedRequest(request, new, grant) for (request, new), grant in zip(items, grants, strict=True))

    def room_for(self, growth: Sequence[Growth], without: Held | None = None) -> tuple[Room, Room]:
        """History and window pages that sequences take while they grow, and how many are free; see `Growth`.

        Args:
            growth (Sequence[Growth]): open requests, or sequences that would begin with the pages of others.
            without (Held | None): owners to leave out, such as all entries of a prefix index.
        """
        return room_for(self._table, self.allocator, growth, without or {})

    def num_free(self, owner: Owner) -> int:
        """Free pages of a kind."""
        return len(self.allocator.pool(owner).free)

    def num_owners(self, owner: Owner, page: int) -> int:
        """How many sequences and snapshots hold a page."""
        return self.allocator.pool(owner).owners[page]

    def begin(self, plan: StepPlan) -> None:
        """Hold a plan's pages from its first write on."""
        self.allocator.reserve([item.grant for item in plan.items])
        self._steps[plan] = {item.request.req_id: item for item in plan.items}
        self.epoch += 1

    def commit(self, plan: StepPlan) -> None:
        """Grow the requests of a step that was begun, then release window pages that no query can reach."""
        items = self._steps.pop(plan).values()
        for item in items:
            request = item.request
            self.allocator.settle(request.pages, item.grant)
            request.seq_len += item.num_new_tokens
            request.min_len = max(request.min_len, request.seq_len - self._max_draft_tokens)
            self._release_window(request)
            self._change(request)

    def items_of(self, plan: StepPlan) -> tuple[PlannedRequest, ...]:
        """The requests that are still part of a step under way."""
        return tuple(self._steps[plan].values())

    def abandon(self, plan: StepPlan) -> None:
        """Give back what a step under way holds."""
        for item in reversed(self._steps.pop(plan).values()):
            self.allocator.withdraw(item.grant)
            self._change(item.request)

    def narrow(self, item: PlannedRequest) -> None:
        """Note that tokens which did not come have used up room for rolling back."""
        request = item.request
        reached = request.seq_len + item.num_new_tokens - self._max_draft_tokens
        request.min_len = min(request.seq_len, max(request.min_len, reached))
        self._release_window(request)

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
        self._change(request)

    def rewind(self, request: Request, snapshot: Snapshot) -> None:
        """Give a request the pages and length of a snapshot."""
        self.check_open(request)
        self.check_kept(snapshot)
        self._withdraw(request)
        shared = self.allocator.share(snapshot.pages)
        self.allocator.release(request.pages)
        request.pages = shared
        request.seq_len, request.min_len = snapshot.seq_len, snapshot.min_len
        request.is_damaged = False
        self._change(request)

    def check_open(self, request: Request) -> None:
        """Raise unless the request is open here."""
        if self._requests.get(request.req_id) is not request:
            raise UnknownRequestError(f"{request}: expected a request opened by this cache and not closed")

    def check_settled(self, request: Request) -> None:
        """Raise unless the request is open here, whole, and no appended plan of it waits for its commit."""
        self.check_open(request)
        _check_whole(request)
        if self._step_of(request) is not None:
            raise StalePlanError(f"{request}: its last plan was appended; expected commit, abandon or close first")

    def check_kept(self, snapshot: Snapshot) -> None:
        """Raise unless the snapshot was taken here and not released."""
        if self._snapshots.get(snapshot.snapshot_id) is not snapshot:
            raise UnknownRequestError(f"{snapshot}: expected a snapshot taken by this cache and not released")

    def is_begun(self, plan: StepPlan) -> bool:
        """Whether a plan is being appended."""
        return plan in self._steps

    def check_plan(self, plan: StepPlan) -> None:
        """Raise unless a plan can be appended, or appended further, and committed."""
        if plan in self._steps:
            for item in self._steps[plan].values():
                _check_whole(item.request)
            if plan.is_given_up:
                raise StalePlanError("plan: an abandon of it was cut off; expected abandon again")
            if len(self._steps[plan]) < len(plan.items):
                raise StalePlanError(
                    "plan: one of its requests was closed or cut back; expected abandon, then a new plan of the others"
                )
            return
        if plan.started:
            raise StalePlanError("plan: expected a new one, got one that is over")
        for item in plan.items:
            self.check_settled(item.request)
            if item.request.changed_at > plan.epoch:
                raise StalePlanError(
                    f"plan: expected one made after {item.request} last changed, at epoch {item.request.changed_at}, "
                    f"got one of epoch {plan.epoch}"
                )
            if not self.allocator.can_reserve(item.grant):
                raise StalePlanError(f"plan: a page that it counted on for {item.request} went to another; expected a new plan")

    def _new_id(self) -> int:
        """A number that this cache has not used for a request or snapshot."""
        self._next_id += 1
        return self._next_id - 1

    def _keep(self, request: Request, pages: PageList, min_len: int, state: tuple[torch.Tensor, ...]) -> Snapshot:
        self.check_settled(request)
        snapshot = Snapshot(
            snapshot_id=self._new_id(),
            req_id=request.req_id,
            seq_len=request.seq_len,
            min_len=min_len,
            pages=self.allocator.share(pages),
            state=state,
        )
        self._snapshots[snapshot.snapshot_id] = snapshot
        self._change(request)
        return snapshot

    def _release_window(self, request: Request) -> None:
        needed = self._table.window_pages(request.seq_len, request.min_len)
        self.allocator.release_window(request.pages, needed)

    def _change(self, request: Request) -> None:
        self.epoch += 1
        request.changed_at = self.epoch

    def _step_of(self, request: Request) -> StepPlan | None:
        return next((plan for plan, items in self._steps.items() if request.req_id in items), None)

    def _withdraw(self, request: Request) -> None:
        """Take a request out of the step that is being appended, if it is in one; the step cannot be finished then."""
        plan = self._step_of(request)
        if plan is not None:
            self.allocator.withdraw(self._steps[plan].pop(request.req_id).grant)
            if not self._steps[plan]:
                del self._steps[plan]


def _check_whole(request: Request) -> None:
    if request.is_damaged:
        raise DamagedRequestError(
            f"{request}: a rewind that failed left its stream state half written; expected rewind or close first"
        )
