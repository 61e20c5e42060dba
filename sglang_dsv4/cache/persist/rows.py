"""A sequence's rows as named tensors on the host, and back."""

from collections.abc import Iterator, Sequence

import torch

from sglang_dsv4.cache.pages.request import Request
from sglang_dsv4.cache.regions import Owner, RegionTable
from sglang_dsv4.cache.storage import LayerStorage, StoredRegion

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Transfer:
    """Moves what a sequence needs, and nothing that others left in its pages or its state slot.

    A *piece* of a sequence is one of its history pages, one of its window pages, or its stream state.

    Args:
        table (RegionTable): the cache's.
        layers (Sequence[LayerStorage]): its memory.
    """

    def __init__(self, table: RegionTable, layers: Sequence[LayerStorage]) -> None:
        self._table = table
        self._stored = [stored for layer in layers for stored in layer.regions]

    def read(self, request: Request, owner: Owner, page: int = 0) -> Tensors:
        """The rows of a piece that the request needs, as they are stored.

        Args:
            request (Request): a settled request.
            owner (Owner): which kind of piece.
            page (int): which of the request's pages, by its place in the sequence; of no meaning for stream state.
        """
        return {stored.region.name: stored.read(rows).cpu() for stored, rows in self._rows(request, owner, page)}

    def write(self, request: Request, owner: Owner, page: int, tensors: Tensors) -> None:
        """Put back what `read` returned."""
        for stored, rows in self._rows(request, owner, page):
            stored.write(rows, tensors[stored.region.name])

    def _rows(self, request: Request, owner: Owner, page: int) -> Iterator[tuple[StoredRegion, torch.Tensor]]:
        held = {
            Owner.HISTORY_PAGE: request.pages.history,
            Owner.WINDOW_PAGE: request.pages.window,
            Owner.STATE_SLOT: [request.state_slot],
        }[owner][page]
        for stored in self._stored:
            region = stored.region
            if region.owner is owner:
                rows = region.needed_in(page, request.seq_len, request.min_len)
                yield stored, held * region.rows_per_owner + torch.tensor(rows, dtype=torch.int64, device=stored.tensor.device)


def shapes_of(table: RegionTable, owner: Owner, seq_len: int, min_len: int, page: int = 0) -> Shapes:
    """What `Transfer.read` returns for a sequence of these lengths."""
    return {
        region.name: StoredRegion.layout(region, len(region.needed_in(page, seq_len, min_len)))
        for region in table.owned_by(owner)
    }
