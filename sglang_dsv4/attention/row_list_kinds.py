"""Which lists of rows the layers of a cache attend to, and how many queries are attended at once."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dsv4_kernels.row_lists import ListKind
from sglang_dsv4.cache import StepPlan
from sglang_dsv4.spec import CacheSpec, LayerSpec

# FlashInfer's planner has room for 16,384 works and does not check; a query is at least one work, and splits add some.
MAX_CHUNK_TOKENS = 8192
# A chunk's lists, and the workspace of decoded rows, stay below these.
_MAX_LIST_BYTES = 256 << 20
_MAX_DECODED_BYTES = 256 << 20


def kind_of(spec: CacheSpec, layer: LayerSpec) -> ListKind:
    """The lists of a layer; layers of one kind have the same."""
    most = spec.index_topk if layer.indexed else None
    return ListKind(layer.kind, spec.window, layer.ratio, most)


@dataclass(frozen=True)
class FixedShape:
    """A step of one shape, for CUDA graphs: every buffer is allocated once.

    Attributes:
        num_tokens (int): queries of every step; those that are missing have position -1.
        max_seq_len (int): longest sequence.
    """

    num_tokens: int
    max_seq_len: int


def longest(plan: StepPlan, fixed: FixedShape | None) -> int:
    """Length that no sequence of the step exceeds: known from shapes, without asking the device."""
    if fixed is not None:
        return fixed.max_seq_len
    return plan.step.history_pages.shape[1] * plan.step.page_tokens


def chunks(num_tokens: int, width: int, *, decoded_row_bytes: int = 0) -> Iterator[slice]:
    """Ranges of queries that are attended at once.

    Args:
        num_tokens (int): queries.
        width (int): longest list.
        decoded_row_bytes (int): bytes per listed row where rows are decoded into a workspace first.
    """
    most = min(MAX_CHUNK_TOKENS, _MAX_LIST_BYTES // (4 * width))
    if decoded_row_bytes:
        most = min(most, _MAX_DECODED_BYTES // (decoded_row_bytes * width))
    most = max(1, most)
    for begin in range(0, num_tokens, most):
        yield slice(begin, min(begin + most, num_tokens))


def is_in_place(selected: torch.Tensor, lists: torch.Tensor) -> bool:
    """Whether chosen rows were written where ``lists`` has them."""
    same = selected.data_ptr() == lists.data_ptr() and selected.stride(0) == lists.stride(0)
    return same and selected.dtype == lists.dtype and selected.stride(1) == 1
