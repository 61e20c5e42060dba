"""Copy-on-write: which rows of a shared page move when one of its owners writes into it."""

from collections.abc import Sequence

import torch

from sglang_dsv4.cache.pages.allocator import NULL_PAGE
from sglang_dsv4.cache.plan import PlannedRequest, RowCopies
from sglang_dsv4.spec import CacheSpec


def plan_copies(spec: CacheSpec, items: Sequence[PlannedRequest], device: torch.device) -> RowCopies | None:
    """Rows that must be in the new pages before a step writes into them.

    Only the page that a request is in the middle of is ever copied: its closed entries, and its window rows that a query
    can still reach.
    """
    ratios = sorted({layer.ratio for layer in spec.layers if layer.ratio})
    window: list[tuple[int, int]] = []
    boundary: list[tuple[int, int]] = []
    history: dict[int, list[tuple[int, int]]] = {ratio: [] for ratio in ratios}
    for item in items:
        request, grant = item.request, item.grant
        used = request.seq_len % spec.page_tokens
        first = request.seq_len - used
        if grant.window_copy != NULL_PAGE:
            begin = max(0, spec.first_window_position(request.min_len) - first)
            old, new = request.pages.window[-1], grant.window_copy
            boundary.append((old, new))
            window += _shifted(old, new, spec.page_tokens, begin, used)
        if grant.history_copy != NULL_PAGE:
            for ratio in ratios:
                old, new = request.pages.history[-1], grant.history_copy
                history[ratio] += _shifted(old, new, spec.page_tokens // ratio, 0, used // ratio)
    if not window and not boundary and not any(history.values()):
        return None
    return RowCopies(
        window=_pair(window, device),
        boundary=_pair(boundary, device),
        history={ratio: _pair(moves, device) for ratio, moves in history.items()},
    )


def _shifted(old: int, new: int, per_page: int, begin: int, end: int) -> list[tuple[int, int]]:
    return [(old * per_page + row, new * per_page + row) for row in range(begin, end)]


def _pair(moves: list[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    stacked = torch.tensor(moves, dtype=torch.int64, device=device).view(-1, 2)
    return stacked[:, 0], stacked[:, 1]
