"""The tensors of a cache: allocated once, never resized."""

from dataclasses import dataclass

import torch

from dsv4_kernels.memory import empty
from dsv4_kernels.norm_rope import RopeSpec, rope_table
from dsv4_kernels.streams import CSA_PARTS
from sglang_dsv4.spec import CacheSpec, LayerSpec


@dataclass(frozen=True)
class StreamStorage:
    """State of one overlapping compressor.

    Attributes:
        streams (torch.Tensor): ``[state slots, ring, 4*D]`` fp32, raw rows; row ``position % ring``.
        boundary (torch.Tensor): ``[window pages, m, 2, D]`` fp32: kv_b and gate_b of the last block of each page.
    """

    streams: torch.Tensor
    boundary: torch.Tensor


@dataclass(frozen=True)
class LayerStorage:
    """Memory of one layer.

    Attributes:
        pool (torch.Tensor): row pool: all window rows, then all entries.
        index_pool (torch.Tensor | None): index keys of a CSA layer.
        main (StreamStorage | None): state of a CSA layer's main compressor.
        index (StreamStorage | None): state of a CSA layer's indexer compressor.
        accumulators (torch.Tensor | None): ``[state slots, ring, 3, D]`` fp32, the open block of an HCA layer after each
            of the last tokens; row ``position % ring``.
    """

    pool: torch.Tensor
    index_pool: torch.Tensor | None
    main: StreamStorage | None
    index: StreamStorage | None
    accumulators: torch.Tensor | None

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """Every tensor of the layer, by the pool it belongs to."""
        stores = [store for store in (self.main, self.index) if store is not None]
        streams = [store.streams for store in stores]
        if self.accumulators is not None:
            streams.append(self.accumulators)
        return {
            "row_pools": [self.pool],
            "index_keys": [] if self.index_pool is None else [self.index_pool],
            "stream_state": streams,
            "boundary_state": [store.boundary for store in stores],
        }


@dataclass(frozen=True)
class Capacity:
    """How much a cache holds.

    Attributes:
        history_pages (int): pages of entries and index keys.
        window_pages (int): pages of window rows and boundary state.
        state_slots (int): requests whose streams fit at once.
        max_seq_len (int): longest sequence; rows of the RoPE tables.
        reserved_pages (int): pages of either kind at the front that no sequence can own, counted above.
    """

    history_pages: int
    window_pages: int
    state_slots: int
    max_seq_len: int
    reserved_pages: int = 0

    def __post_init__(self) -> None:
        for name in ("history_pages", "window_pages", "state_slots", "max_seq_len"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")


class CacheStorage:
    """All tensors of a cache. Uninitialised: nothing may read a row before it was written."""

    def __init__(self, spec: CacheSpec, capacity: Capacity, device: torch.device) -> None:
        self.num_window_rows = capacity.window_pages * spec.page_tokens
        self.layers = tuple(_allocate_layer(spec, layer, capacity, device) for layer in spec.layers)
        ropes = {layer.rope for layer in spec.layers}
        self.rope_tables: dict[RopeSpec, torch.Tensor] = {
            rope: rope_table(rope, capacity.max_seq_len, device) for rope in ropes
        }

    def bytes_by_pool(self) -> dict[str, int]:
        """Bytes really allocated, by pool."""
        totals = {"row_pools": 0, "index_keys": 0, "stream_state": 0, "boundary_state": 0}
        for layer in self.layers:
            for name, tensors in layer.tensors().items():
                totals[name] += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        totals["rope_tables"] = sum(table.untyped_storage().nbytes() for table in self.rope_tables.values())
        return totals


def _allocate_layer(spec: CacheSpec, layer: LayerSpec, capacity: Capacity, device: torch.device) -> LayerStorage:
    window_rows = capacity.window_pages * spec.page_tokens
    entries = capacity.history_pages * (spec.page_tokens // layer.ratio) if layer.ratio else 0
    rows, keys = spec.rows, spec.index_keys
    return LayerStorage(
        pool=empty(rows.pool_shape(window_rows + entries), rows.storage_dtype, device),
        index_pool=empty(keys.pool_shape(entries), keys.storage_dtype, device) if layer.indexed else None,
        main=_allocate_streams(spec, layer, spec.head_dim, capacity, device) if layer.overlap else None,
        index=_allocate_streams(spec, layer, spec.index_dim, capacity, device) if layer.indexed else None,
        accumulators=(
            empty((capacity.state_slots, spec.accumulator_rows, 3, spec.head_dim), torch.float32, device)
            if layer.kind == "hca"
            else None
        ),
    )


def _allocate_streams(spec: CacheSpec, layer: LayerSpec, dim: int, capacity: Capacity, device: torch.device) -> StreamStorage:
    ring = spec.stream_rows(layer.ratio)
    return StreamStorage(
        streams=empty((capacity.state_slots, ring, CSA_PARTS * dim), torch.float32, device),
        boundary=empty((capacity.window_pages, layer.ratio, 2, dim), torch.float32, device),
    )
