"""Reference row lists."""

import torch

from dsv4_kernels.row_lists.kind import ListKind
from dsv4_kernels.step import StepTensors


def naive_row_lists(
    step: StepTensors,
    kind: ListKind,
    lists: torch.Tensor,
    selected: torch.Tensor | None = None,
    *,
    window: bool = True,
    pad: bool = False,
    lengths: torch.Tensor | None = None,
) -> None:
    """Write each query's list: the rows of its entries, then the rows of its window, oldest first, without a gap.

    Equation:
        list_t = rows of the entries s < (t + 1) // ratio, or of the chosen ones, then of the window rows of
        positions max(0, t - window + 1) .. t      [LISTS]
        Source: report section 2.3.3, both parts of a query's keys; a block's last token sees the block's entry.

    Args:
        step (StepTensors): the step.
        kind (ListKind): which rows are listed.
        lists (torch.Tensor): ``[T, W]`` int32. Written at the columns below each list's length.
        selected (torch.Tensor | None): ``[T, K]`` int32 or int64 pool rows, ``kind.num_entries`` valid ones first, for a
            kind that lists chosen entries; None leaves the entries unwritten there.
        window (bool): write the window part.
        pad (bool): write -1 behind each list.
        lengths (torch.Tensor | None): ``[T]`` int32. Gets each list's length, but at least 1: FlashMLA expects a tile of every
            list. Where a list is empty its first column must be -1, which attention skips; ``pad`` makes it so.
    """
    positions = step.positions.unsqueeze(1)
    rows = step.token_rows.unsqueeze(1)
    columns = torch.arange(lists.shape[1], device=lists.device).expand(lists.shape)
    num_entries, ends = kind.num_entries(positions), kind.lengths(positions)  # [T, 1]
    is_entry = columns < num_entries
    if kind.most is None and kind.ratio:
        entry_idx = columns.minimum((num_entries - 1).clamp_min(0))
        slots = step.entry_slots(rows, entry_idx, kind.ratio)
        lists.copy_(torch.where(is_entry, slots.int(), lists))
    elif selected is not None and selected.shape[1]:
        chosen = selected.gather(1, columns.clamp_max(selected.shape[1] - 1))
        lists.copy_(torch.where(is_entry, chosen.int(), lists))
    if window:
        reached = positions + 1 - kind.num_window(positions) + columns - num_entries
        reached = reached.clamp_min(0).minimum(positions.clamp_min(0))
        slots = step.window_slots(rows, reached).int()
        lists.copy_(torch.where(~is_entry & (columns < ends), slots, lists))
    if pad:
        lists.masked_fill_(columns >= ends, -1)
    if lengths is not None:
        lengths.copy_(ends.squeeze(1).clamp_min(1))
