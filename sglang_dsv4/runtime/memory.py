"""Whether a cache can lie on a device at all, before anything is allocated."""

import os

import torch

from sglang_dsv4.cache.regions import Owner, RegionTable
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.runtime.show.units import format_bytes
from sglang_dsv4.spec import CacheSpec


def check_device(device: str | torch.device) -> torch.device:
    """The device.

    Raises:
        UnsupportedError: torch does not know it, or this machine does not have it.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(f"device: expected cpu or cuda, got {device!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device: expected cpu or cuda, got {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        raise UnsupportedError(f"device {found}: expected a CUDA device that torch can use, found {count or 'none'}")
    return found


def check_fits(spec: CacheSpec, num_pages: int, num_window_pages: int, device: torch.device) -> None:
    """Raise unless the device's memory is at least as large as the rows of a cache's pages.

    Raises:
        UnsupportedError: it is smaller.
    """
    table = RegionTable(spec)
    needed = num_pages * table.bytes_of(Owner.HISTORY_PAGE) + num_window_pages * table.bytes_of(Owner.WINDOW_PAGE)
    size = _memory_of(device)
    if needed > size:
        raise UnsupportedError(
            f"num_pages {num_pages}: expected a cache that fits into the {format_bytes(size)} of {device}, got one of "
            f"{format_bytes(needed)}"
        )


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
