"""How the scores of index keys are cut into tiles and programs. What was tried: benchmarks/README.md."""

from functools import cache
from typing import NamedTuple

import torch

from dsv4_kernels.layout import RowFormat


class IndexTuning(NamedTuple):
    """Entries of a tile, tokens of a unit, warps, stages, programs per multiprocessor, and registers of a thread at most.

    None changes a score, as long as a tile of rounded keys has at least 64 entries: a smaller one may be computed by another
    instruction of the tensor cores, which need not round alike.
    """

    entries: int
    unit: int
    warps: int
    stages: int
    occupancy: int
    registers: int | None = None


def index_tuning(num_tokens: int, num_requests: int, exact: bool) -> IndexTuning:
    """Tile of the scores, by shape: a decode step shares no keys and waits for memory, a prefill for tensor cores."""
    if exact:
        return IndexTuning(32, 1, 4, 1, 4)
    if num_tokens <= num_requests:
        return IndexTuning(64, 1, 4, 4, 4)
    return IndexTuning(64, 2, 4, 4, 3, 168)


def rows_together(per_page: int, key_format: RowFormat, entries: int) -> int:
    """Rows of a tile that lie together: the whole, or each half.

    Raises:
        ValueError: the tile has more than two parts.
    """
    whole = per_page & -per_page  # the largest power of two that divides it
    if key_format.group_rows > 1:
        whole = min(whole, key_format.group_rows)
    part = min(whole, entries)
    if entries > 2 * part:
        raise ValueError(f"tile: expected at most {2 * part} entries for pages of {per_page}, got {entries}")
    return part


@cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def num_programs(device: torch.device, occupancy: int) -> int:
    """Programs that fit on a device at once; on a CPU, where kernels are interpreted, a few."""
    if device.type != "cuda":
        return 3
    index = torch.cuda.current_device() if device.index is None else device.index
    return _multiprocessors(index) * occupancy
