"""Copy-on-write: which rows of a shared page move when one of its owners writes into it."""

from collections.abc import Iterable, Sequence

import torch

from sglang_dsv4.cache.pages.tables import NULL_PAGE
from sglang_dsv4.cache.plan import PlannedRequest, RowCopies
from sglang_dsv4.cache.regions import Kind, Owner, RegionTable
from sglang_dsv4.cache.storage import StoredRegion


def plan_copies(table: RegionTable, items: Sequence[PlannedRequest], device: torch.device) -> RowCopies | None:
    """Rows that must be in the new pages before a step writes into them; None where nothing is shared.

    Only the page that a request is in the middle of is ever copied: of it, the rows that the request needs, also if it is cut
    back later.
    """
    moves: dict[tuple[Kind, int], list[tuple[int, int]]] = {}
    for item in items:
        request, grant = item.request, item.grant
        page = request.seq_len // table.page_tokens
        for owner, held, new in (
            (Owner.HISTORY_PAGE, request.pages.history, grant.history_copy),
            (Owner.WINDOW_PAGE, request.pages.window, grant.window_copy),
        ):
            if new != NULL_PAGE:
                for region in table.places[owner]:
                    rows = region.needed_in(page, request.seq_len, request.min_len)
                    source, target = held[-1] * region.rows_per_owner, new * region.rows_per_owner
                    moves.setdefault(region.places, []).extend((source + row, target + row) for row in rows)
    if not moves:
        return None
    stacked = {places: torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 2) for places, rows in moves.items()}
    return RowCopies({places: (pairs[:, 0], pairs[:, 1]) for places, pairs in stacked.items()})


def copy_rows(copies: RowCopies, regions: Iterable[StoredRegion]) -> int:
    """Move the rows of some regions; returns how many bytes."""
    return sum(stored.copy(*copies.moves[stored.region.places]) for stored in regions if stored.region.places in copies.moves)
