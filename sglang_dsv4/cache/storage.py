"""The tensors of a cache: allocated once, never resized."""

from dataclasses import dataclass

import torch

from dsv4_kernels.memory import empty
from dsv4_kernels.norm_rope import RopeSpec, rope_table
from dsv4_kernels.row_codec import naive_load_rows, naive_put_row_bytes, naive_row_bytes
from sglang_dsv4.cache.regions import Kind, Owner, Part, Region, RegionTable
from sglang_dsv4.spec import CacheSpec

# The pool that a kind of row is counted in.
_POOLS = {
    Kind.WINDOW_ROW: "row_pools",
    Kind.ENTRY: "row_pools",
    Kind.INDEX_KEY: "index_keys",
    Kind.STREAM: "stream_state",
    Kind.ACCUMULATOR: "stream_state",
    Kind.BOUNDARY: "boundary_state",
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

    def count(self, owner: Owner) -> int:
        """How many there are of an owner."""
        counts = {
            Owner.HISTORY_PAGE: self.history_pages,
            Owner.WINDOW_PAGE: self.window_pages,
            Owner.STATE_SLOT: self.state_slots,
        }
        return counts[owner]


@dataclass(frozen=True)
class StoredRegion:
    """A region and its memory.

    Attributes:
        region (Region): what it is.
        tensor (torch.Tensor): a pool of packed rows, or fp32 ``[owners, rows_per_owner, *shape]``.
        first_row (int): the region's row 0 among the rows of the tensor; a row pool holds window rows, then entries.
    """

    region: Region
    tensor: torch.Tensor
    first_row: int = 0

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """What rows ``[R]`` stand for: ``[R, width]`` fp32."""
        if self.region.row_format is None:
            return self.tensor.flatten(0, 1)[rows].flatten(1)
        return naive_load_rows(self.tensor, self.first_row + rows, self.region.row_format)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as they are stored: ``[R, row_bytes]`` uint8, or ``[R, *shape]`` fp32."""
        if self.region.row_format is None:
            return self.tensor.flatten(0, 1)[rows]
        return naive_row_bytes(self.tensor, self.first_row + rows, self.region.row_format)

    def write(self, rows: torch.Tensor, stored: torch.Tensor) -> None:
        """Put back what `read` returned."""
        stored = stored.to(self.tensor.device)
        if self.region.row_format is None:
            self.tensor.flatten(0, 1)[rows] = stored
        else:
            naive_put_row_bytes(self.tensor, self.first_row + rows, stored, self.region.row_format)

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> int:
        """Copy rows within the region; returns how many bytes."""
        self.write(targets, self.read(sources))
        return len(sources) * self.region.row_bytes

    @staticmethod
    def layout(region: Region, num_rows: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of what `read` returns for so many rows."""
        if region.row_format is None:
            return (num_rows, *region.shape), torch.float32
        return (num_rows, region.row_bytes), torch.uint8


class LayerStorage:
    """Memory of one layer.

    Attributes:
        regions (tuple[StoredRegion, ...]): what it holds, in the order of `sglang_dsv4.cache.regions.layer_regions`.
        num_window_rows (int): window rows of the row pool; its entries follow them.
    """

    def __init__(self, regions: tuple[Region, ...], capacity: Capacity, device: torch.device) -> None:
        counts = {region: capacity.count(region.owner) * region.rows_per_owner for region in regions}
        window = next(region for region in regions if region.kind is Kind.WINDOW_ROW)
        in_pool = sum(count for region, count in counts.items() if _POOLS[region.kind] == "row_pools")
        self.num_window_rows = counts[window]
        pool = _packed(window, in_pool, device)
        found = []
        for region, count in counts.items():
            if _POOLS[region.kind] == "row_pools":
                found.append(StoredRegion(region, pool, 0 if region is window else self.num_window_rows))
            elif region.row_format is not None:
                found.append(StoredRegion(region, _packed(region, count, device)))
            else:
                shape = (capacity.count(region.owner), region.rows_per_owner, *region.shape)
                found.append(StoredRegion(region, empty(shape, torch.float32, device)))
        self.regions = tuple(found)

    @property
    def pool(self) -> torch.Tensor:
        """The row pool: all window rows, then all entries."""
        return self.regions[0].tensor

    def tensor(self, kind: Kind, part: Part) -> torch.Tensor | None:
        """The memory of one kind of row; None in a layer that has none."""
        found = (stored.tensor for stored in self.regions if (stored.region.kind, stored.region.part) == (kind, part))
        return next(found, None)

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """Every tensor of the layer, by the pool it belongs to."""
        pools: dict[str, list[torch.Tensor]] = {name: [] for name in _POOLS.values()}
        for stored in self.regions:
            pool = pools[_POOLS[stored.region.kind]]
            if not any(stored.tensor is known for known in pool):
                pool.append(stored.tensor)
        return pools


class CacheStorage:
    """All tensors of a cache. Uninitialised: nothing may read a row before it was written.

    Attributes:
        table (RegionTable): what they hold.
        layers (tuple[LayerStorage, ...]): by layer.
        rope_tables (dict[RopeSpec, torch.Tensor]): ``[max_seq_len, R]`` fp32 each.
        num_window_rows (int): window rows of each row pool.
    """

    def __init__(self, spec: CacheSpec, capacity: Capacity, device: torch.device) -> None:
        self.table = RegionTable(spec)
        self.layers = tuple(LayerStorage(regions, capacity, device) for regions in self.table.layers)
        self.num_window_rows = self.layers[0].num_window_rows
        self.rope_tables: dict[RopeSpec, torch.Tensor] = {
            rope: rope_table(rope, capacity.max_seq_len, device) for rope in {layer.rope for layer in spec.layers}
        }

    @property
    def stream_state(self) -> list[torch.Tensor]:
        """Every tensor that a request has a row of, ``[state slots, ...]``."""
        return [stored.tensor for layer in self.layers for stored in layer.regions if stored.region.owner is Owner.STATE_SLOT]

    def bytes_by_pool(self) -> dict[str, int]:
        """Bytes really allocated, by pool."""
        totals = dict.fromkeys(_POOLS.values(), 0)
        for layer in self.layers:
            for name, tensors in layer.tensors().items():
                totals[name] += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        totals["rope_tables"] = sum(table.untyped_storage().nbytes() for table in self.rope_tables.values())
        return totals


def _packed(region: Region, num_rows: int, device: torch.device) -> torch.Tensor:
    """A pool of so many packed rows."""
    assert region.row_format is not None, f"{region.name}: a packed region has a row format"
    return empty(region.row_format.pool_shape(num_rows), region.row_format.storage_dtype, device)
