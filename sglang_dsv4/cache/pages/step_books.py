"""What steps over owned pages take, hold and leave to their requests. Host only; moves no rows."""

from collections.abc import Sequence
from numbers import Integral

from sglang_dsv4.cache.pages.request import Request
from sglang_dsv4.cache.pages.requests import Requests, check_whole
from sglang_dsv4.cache.plan import PlannedRequest, StepPlan
from sglang_dsv4.errors import StalePlanError


class StepBooks:
    """Steps of `Requests`, from what a plan is granted to what its commit adds.

    A step is under way from its first append until it is committed, abandoned, or without requests. Every method either does all
    it says, or raises before it changes anything.
    """

    def __init__(self, requests: Requests, max_draft_tokens: int) -> None:
        self._requests = requests
        self._allocator = requests.allocator
        self._max_draft_tokens = max_draft_tokens

    def grant(self, items: Sequence[tuple[Request, int]]) -> tuple[PlannedRequest, ...]:
        """What each request takes when it grows by so many tokens; changes nothing."""
        for request, num_new_tokens in items:
            self._requests.check_settled(request)
            if not _is_integer(num_new_tokens):
                raise TypeError(f"{request}: expected an integer of new tokens, got {num_new_tokens!r}")
            if num_new_tokens < 0:
                raise ValueError(f"{request}: expected 0 or more new tokens, got {num_new_tokens}")
        if len({request.req_id for request, _ in items}) != len(items):
            ids = [request.req_id for request, _ in items]
            raise ValueError(f"plan: expected each request once, got {ids}")
        grants = self._allocator.grant([(request.pages, request.seq_len, request.seq_len + new) for request, new in items])
        return tuple(PlannedRequest(request, new, grant) for (request, new), grant in zip(items, grants, strict=True))

    def begin(self, plan: StepPlan) -> None:
        """Hold a plan's pages from its first write on."""
        self._allocator.reserve([item.grant for item in plan.items])
        self._requests.under_way[plan] = {item.request.req_id: item for item in plan.items}
        self._requests.epoch += 1

    def commit(self, plan: StepPlan) -> None:
        """Grow the requests of a step that was begun, then release window pages that no query can reach."""
        items = self._requests.under_way.pop(plan).values()
        for item in items:
            request = item.request
            self._allocator.settle(request.pages, item.grant)
            request.seq_len += item.num_new_tokens
            request.min_len = max(request.min_len, request.seq_len - self._max_draft_tokens)
            self._release_window(request)
            self._requests.change(request)

    def items_of(self, plan: StepPlan) -> tuple[PlannedRequest, ...]:
        """The requests that are still part of a step under way."""
        return tuple(self._requests.under_way[plan].values())

    def abandon(self, plan: StepPlan) -> None:
        """Give back what a step under way holds."""
        for item in reversed(self._requests.under_way.pop(plan).values()):
            self._allocator.withdraw(item.grant)
            self._requests.change(item.request)

    def narrow(self, item: PlannedRequest) -> None:
        """Note that tokens which did not come have used up room for rolling back."""
        request = item.request
        reached = request.seq_len + item.num_new_tokens - self._max_draft_tokens
        request.min_len = min(request.seq_len, max(request.min_len, reached))
        self._release_window(request)

    def is_begun(self, plan: StepPlan) -> bool:
        """Whether a plan is being appended."""
        return plan in self._requests.under_way

    def check(self, plan: StepPlan) -> None:
        """Raise unless a plan can be appended, or appended further, and committed."""
        if plan in self._requests.under_way:
            for item in self._requests.under_way[plan].values():
                check_whole(item.request)
            if plan.is_given_up:
                raise StalePlanError("plan: an abandon of it was cut off; expected abandon again")
            if len(self._requests.under_way[plan]) < len(plan.items):
                raise StalePlanError(
                    "plan: one of its requests was closed or cut back; expected abandon, then a new plan of the others"
                )
            return
        if plan.started:
            raise StalePlanError("plan: expected a new one, got one that is over")
        for item in plan.items:
            self._requests.check_settled(item.request)
            if item.request.changed_at > plan.epoch:
                raise StalePlanError(
                    f"plan: expected one made after {item.request} last changed, at epoch {item.request.changed_at}, "
                    f"got one of epoch {plan.epoch}"
                )
            if not self._allocator.can_reserve(item.grant):
                raise StalePlanError(f"plan: a page that it counted on for {item.request} went to another; expected a new plan")

    def _release_window(self, request: Request) -> None:
        needed = self._requests.table.window_pages(request.seq_len, request.min_len)
        self._allocator.release_window(request.pages, needed)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
