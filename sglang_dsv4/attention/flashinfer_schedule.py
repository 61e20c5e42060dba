"""Our own schedule in the workspace of FlashInfer's MLA kernel: made on the device, so that it can be captured."""

from collections.abc import Callable

import torch

from dsv4_kernels.memory import empty
from dsv4_kernels.mla_schedule import WorkLists, max_works, naive_mla_schedule
from dsv4_kernels.mla_schedule.fused import mla_schedule
from dsv4_kernels.row_lists import ListKind
from dsv4_kernels.sink_rope import Splits

# Versions whose plan layout (`MLAPlanInfo` in scheduler.cuh, read by batch_mla_run.cu) is the one written here.
KNOWN_VERSIONS = ("0.6.18", "0.6.18.post1")
_PLAN_FIELDS = 18
_CTA_ROWS = 64
_ALIGN = 16


class Partials:
    """Results of pieces. One stream needs one: a layer's pieces are merged before the next layer's are made.

    Attributes:
        num_blocks (int): thread blocks that work on one query together, 64 heads each.
        num_lanes (int): queries that are worked on at once.
        floats (torch.Tensor): FlashInfer's float workspace: partial results, then their log-sum-exp.
    """

    def __init__(self, num_heads: int, head_dim: int, num_sms: int, device: torch.device) -> None:
        self.num_heads = num_heads
        self.num_sms = num_sms
        self.num_blocks = -(-num_heads // _CTA_ROWS)
        self.num_lanes = num_sms // self.num_blocks
        # FlashInfer's planner, which may use the workspace too, has 64 rows per thread block whatever the heads.
        rows = 2 * self.num_lanes * self.num_blocks * _CTA_ROWS
        self.lse_offset = 2 * rows * head_dim
        self.floats = empty((self.lse_offset + 4 * rows,), torch.uint8, device)
        used = 2 * self.num_lanes * num_heads
        values, lse = self.floats[: self.lse_offset], self.floats[self.lse_offset :]
        self.partial = values.view(torch.bfloat16)[: used * head_dim].view(-1, num_heads, head_dim)
        self.partial_lse = lse.view(torch.float32)[:used].view(-1, num_heads)


class OwnSchedule:
    """Work lists of up to ``max_tokens`` queries, as the kernel reads them.

    The kernel is told to merge nothing: pieces of a query stay apart, and `dsv4_kernels.sink_rope` merges them in the pass
    that it makes over the result anyway. FlashInfer's own merge takes a thread block four rows at a time, one after another.

    Args:
        max_tokens (int): queries, at most.
        partials (Partials): where pieces go.
        device (torch.device): of the GPU.
        split (bool): whether queries may be cut into pieces.

    Attributes:
        plan_info (list[int]): FlashInfer's plan: grid, and byte offsets into the workspaces.
        ints (torch.Tensor): its int workspace.
        partials (Partials): its float workspace.
    """

    def __init__(self, max_tokens: int, partials: Partials, device: torch.device, split: bool = True) -> None:
        self.partials = partials
        self._split = split
        lanes = partials.num_lanes
        works = max_works(max_tokens, lanes)
        sizes = dict.fromkeys(WorkLists._fields, works)
        sizes |= {"lane_begin": lanes + 1, "first_lane": max_tokens, "num_pieces": max_tokens}
        sizes |= {"ones": works, "zeros": max(works, partials.num_sms)}
        offsets, total = {}, 0
        for name, count in sizes.items():
            offsets[name] = total
            total += -(-4 * count // _ALIGN) * _ALIGN
        self.ints = torch.zeros(total, dtype=torch.uint8, device=device)

        def section(name: str) -> torch.Tensor:
            return self.ints[offsets[name] : offsets[name] + 4 * sizes[name]].view(torch.int32)

        section("ones").fill_(1)
        self.work = WorkLists(**{name: section(name) for name in WorkLists._fields})
        merge = [offsets["zeros"]] * 5  # every range of rows to merge is 0 .. 0
        self.plan_info = [
            partials.num_blocks,
            lanes,
            offsets["query"],
            offsets["list_begin"],
            offsets["partial_row"],
            *merge,
            offsets["ones"],
            offsets["list_length"],
            offsets["zeros"],
            offsets["key_begin"],
            offsets["key_end"],
            offsets["lane_begin"],
            0,
            partials.lse_offset,
        ]
        assert len(self.plan_info) == _PLAN_FIELDS

    def plan(self, positions: torch.Tensor, kind: ListKind, list_stride: int) -> None:
        """Schedule the queries at ``positions``; launches one kernel."""
        make: Callable[..., None] = mla_schedule if positions.is_cuda else naive_mla_schedule
        make(positions, kind, list_stride, self.partials.num_heads, self.work, self._split)

    def splits(self, num_tokens: int) -> Splits:
        """Where the pieces of the planned queries are."""
        work, partials = self.work, self.partials
        return Splits(work.first_lane[:num_tokens], work.num_pieces[:num_tokens], partials.partial, partials.partial_lse)


def read_stock_plan(plan_info: list[int], ints: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """Works in a plan that FlashInfer's planner made: (query, where its list begins, first key, behind the last).

    Args:
        plan_info (list[int]): what the planner returned.
        ints (torch.Tensor): the int workspace on the CPU, bytes.
    """
    if len(plan_info) != _PLAN_FIELDS:
        raise ValueError(f"FlashInfer's plan: expected {_PLAN_FIELDS} numbers, got {len(plan_info)}")

    def numbers(field: int, count: int) -> list[int]:
        offset = plan_info[field]
        return ints[offset : offset + 4 * count].view(torch.int32).tolist()

    count = numbers(15, plan_info[1] + 1)[-1]
    columns = [numbers(field, count) for field in (2, 3, 13, 14)]
    return list(zip(*columns, strict=True))


def check_stock_plan(works: list[tuple[int, int, int, int]], lengths: list[int], list_stride: int) -> None:
    """Raise unless ``works`` covers each query's keys exactly once: then the layout is read as it is meant.

    Raises:
        ValueError: it does not.
    """
    taken: dict[int, list[tuple[int, int]]] = {}
    for query, begin, start, end in works:
        if not 0 <= query < len(lengths) or begin != query * list_stride:
            raise ValueError(f"FlashInfer's plan: expected lists of stride {list_stride}, got {works}")
        taken.setdefault(query, []).append((start, end))
    for query, length in enumerate(lengths):
        at = 0
        for start, end in sorted(taken.get(query, [])):
            if start != at:
                raise ValueError(f"FlashInfer's plan: query {query} goes on at {start}, expected {at}")
            at = end
        if at != length:
            raise ValueError(f"FlashInfer's plan: query {query} ends at {at}, expected {length}")
