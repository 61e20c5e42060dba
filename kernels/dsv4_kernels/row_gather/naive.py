"""Reference gather of listed rows."""

import torch

from dsv4_kernels.layout import RowFormat
from dsv4_kernels.row_codec import naive_load_rows


def naive_row_gather(
    pool: torch.Tensor, pool_format: RowFormat, lists: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor
) -> None:
    """Decode the rows of each list into the list's place in a dense workspace.

    Equation: rows[t W + c] = DECODE(pool[lists[t, c]]), c < lengths[t]      [GATHER]

    Args:
        pool (torch.Tensor): a row pool.
        pool_format (RowFormat): its format.
        lists (torch.Tensor): ``[T, W]`` int32 pool rows.
        lengths (torch.Tensor): ``[T]``, how many columns of each list count.
        rows (torch.Tensor): ``[T * W, D]``. Written at row ``t * W + c`` for every ``c < lengths[t]``; rounded to nearest even.
            An e4m3 value times a power of two is exact in bf16.
    """
    used = torch.arange(lists.shape[1], device=lists.device) < lengths.unsqueeze(1)  # [T, W]
    rows[used.flatten()] = naive_load_rows(pool, lists[used].long(), pool_format).to(rows.dtype)
