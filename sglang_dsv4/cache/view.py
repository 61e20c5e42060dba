"""What attention needs of one layer."""

from dataclasses import dataclass

import torch

from dsv4_kernels.layout import RowFormat


@dataclass(frozen=True)
class LayerView:
    """One layer's rows and, for each new token, which of them to attend to.

    Attributes:
        pool (torch.Tensor): the row pool.
        pool_format (RowFormat): its format.
        window_indices (torch.Tensor): ``[T, window]`` int64 pool rows, -1 at the end.
        entry_indices (torch.Tensor | None): ``[T, K]`` int64 pool rows of entries, -1 where there are fewer; None for a
            window-only layer and for a CSA layer, whose entries `CompressedKVCache.select` chooses.
    """

    pool: torch.Tensor
    pool_format: RowFormat
    window_indices: torch.Tensor
    entry_indices: torch.Tensor | None
