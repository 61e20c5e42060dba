"""A sequence's rows and state as named tensors on the host, and back."""

from collections.abc import Iterator, Sequence

import torch

from dsv4_kernels.row_codec import naive_put_row_bytes, naive_row_bytes
from sglang_dsv4.cache.layer import LayerCache
from sglang_dsv4.cache.pages.allocator import NULL_PAGE
from sglang_dsv4.cache.pages.request import Request
from sglang_dsv4.cache.persist.contents import first_accumulator_position, first_stream_position, window_range
from sglang_dsv4.spec import CacheSpec

Tensors = dict[str, torch.Tensor]


class Transfer:
    """Moves what a sequence needs, and nothing that others left in its pages or its state row.

    Args:
        spec (CacheSpec): the cache's.
        layers (Sequence[LayerCache]): its layers.
    """

    def __init__(self, spec: CacheSpec, layers: Sequence[LayerCache]) -> None:
        self._spec = spec
        self._layers = layers

    def read_history(self, request: Request, index: int) -> Tensors:
        """Closed entries and index keys of the request's history page ``index``, as stored bytes."""
        return {name: stored.cpu() for name, stored in self._history(request, index)}

    def write_history(self, request: Request, index: int, tensors: Tensors) -> None:
        """Put back what `read_history` returned."""
        self._history_put(request, index, tensors)

    def read_window(self, request: Request, index: int) -> Tensors:
        """Reachable window rows, and boundary state, of the request's window page ``index``."""
        found: Tensors = {}
        begin, end, boundary_rows = self._window_range(request, index)
        for layer, name, rows in self._window_rows(request, index, begin, end):
            found[name] = naive_row_bytes(layer.storage.pool, rows, self._spec.rows).cpu()
        for name, boundary in self._boundary(request, index, boundary_rows):
            found[name] = boundary.clone().cpu()
        return found

    def write_window(self, request: Request, index: int, tensors: Tensors) -> None:
        """Put back what `read_window` returned."""
        begin, end, boundary_rows = self._window_range(request, index)
        for layer, name, rows in self._window_rows(request, index, begin, end):
            stored = tensors[name].to(rows.device)
            naive_put_row_bytes(layer.storage.pool, rows, stored, self._spec.rows)
        for name, boundary in self._boundary(request, index, boundary_rows):
            boundary.copy_(tensors[name])

    def read_state(self, request: Request) -> Tensors:
        """Stream rows and accumulators that the request can still need."""
        return {name: state[request.state_slot, rows].cpu() for name, state, rows in self._state(request)}

    def write_state(self, request: Request, tensors: Tensors) -> None:
        """Put back what `read_state` returned."""
        for name, state, rows in self._state(request):
            state[request.state_slot, rows] = tensors[name].to(state.device)

    def _history_rows(self, layer: LayerCache, request: Request, index: int) -> torch.Tensor:
        per_page = self._spec.page_tokens // layer.layer.ratio
        closed = min(request.num_entries(layer.layer.ratio) - index * per_page, per_page)
        first = request.pages.history[index] * per_page
        return first + torch.arange(closed, device=layer.storage.pool.device)

    def _history(self, request: Request, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        for layer in self._layers:
            if layer.layer.ratio:
                name, rows = (f"layer.{layer.layer.layer_id}", self._history_rows(layer, request, index))
                entries = naive_row_bytes(layer.storage.pool, layer.num_window_rows + rows, self._spec.rows)
                yield f"{name}.entries", entries
                if layer.storage.index_pool is not None:
                    keys = naive_row_bytes(layer.storage.index_pool, rows, self._spec.index_keys)
                    yield f"{name}.index_keys", keys

    def _history_put(self, request: Request, index: int, tensors: Tensors) -> None:
        for layer in self._layers:
            if layer.layer.ratio:
                name, rows = (f"layer.{layer.layer.layer_id}", self._history_rows(layer, request, index))
                entries = tensors[f"{name}.entries"].to(rows.device)
                naive_put_row_bytes(layer.storage.pool, layer.num_window_rows + rows, entries, self._spec.rows)
                if layer.storage.index_pool is not None:
                    keys = tensors[f"{name}.index_keys"].to(rows.device)
                    naive_put_row_bytes(layer.storage.index_pool, rows, keys, self._spec.index_keys)

    def _window_range(self, request: Request, index: int) -> tuple[int, int, int]:
        """First and last row of a page that a query can reach, and how many rows of its boundary state are written."""
        assert request.pages.window[index] != NULL_PAGE, "a window page that is held"
        begin, end = window_range(self._spec, request.seq_len, request.min_len, index)
        return begin, end, end - self._spec.page_tokens

    def _window_rows(
        self, request: Request, index: int, begin: int, end: int
    ) -> Iterator[tuple[LayerCache, str, torch.Tensor]]:
        page = request.pages.window[index] * self._spec.page_tokens
        for layer in self._layers:
            rows = page + torch.arange(begin, end, device=layer.storage.pool.device)
            yield layer, f"layer.{layer.layer.layer_id}.window", rows

    def _boundary(self, request: Request, index: int, missing: int) -> Iterator[tuple[str, torch.Tensor]]:
        page = request.pages.window[index]
        for layer in self._layers:
            for part, store in (("main", layer.storage.main), ("index", layer.storage.index)):
                if store is not None:
                    written = max(0, store.boundary.shape[1] + missing)
                    yield (f"layer.{layer.layer.layer_id}.boundary.{part}", store.boundary[page, :written])

    def _state(self, request: Request) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        for layer in self._layers:
            ratio, storage = layer.layer.ratio, layer.storage
            for part, store in (("main", storage.main), ("index", storage.index)):
                if store is not None:
                    first = first_stream_position(request.min_len, ratio)
                    rows = self._ring(first, request.seq_len, store.streams)
                    yield f"layer.{layer.layer.layer_id}.streams.{part}", store.streams, rows
            if storage.accumulators is not None:
                first = first_accumulator_position(request.min_len)
                rows = self._ring(first, request.seq_len, storage.accumulators)
                yield f"layer.{layer.layer.layer_id}.accumulators", storage.accumulators, rows

    @staticmethod
    def _ring(first: int, last: int, state: torch.Tensor) -> torch.Tensor:
        return torch.arange(first, last, device=state.device) % state.shape[1]
