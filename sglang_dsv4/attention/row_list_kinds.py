"""Which lists of rows the layers of a cache attend to, and how many queries are attended at once."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dsv4_kernels.row_lists import ListKind
from sglang_dsv4.attention.base import HostLengths
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


def kinds_of(spec: CacheSpec) -> tuple[ListKind, ...]:
    """Every kind among the layers."""
    return tuple(dict.fromkeys(kind_of(spec, layer) for layer in spec.layers))


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


def host_lengths(plan: StepPlan, lengths: HostLengths | None) -> HostLengths:
    """A step's lengths: those that were given, or what a plan of a cache that owns its pages knows.

    Raises:
        ValueError: the plan is of pages that somebody else owns, and no lengths were given.
    """
    if lengths is not None:
        return lengths
    if not plan.items:
        raise ValueError(
            "plan: expected the lengths of a step over external pages, got none; a schedule on the host needs them"
        )
    return HostLengths(
        [item.request.seq_len + item.num_new_tokens for item in plan.items], [item.num_new_tokens for item in plan.items]
    )


def host_positions(plan: StepPlan, lengths: HostLengths | None) -> torch.Tensor:
    """Position of each query on the CPU, padded with -1 to the plan's tokens.

    Raises:
        ValueError: there are no lengths, as in `host_lengths`; or they do not fit the plan.
    """
    positions = host_lengths(plan, lengths).positions()
    missing = plan.num_tokens - len(positions)
    if missing < 0:
        raise ValueError(f"plan: expected lengths of at most {plan.num_tokens} new tokens, got {len(positions)}")
    return torch.cat([positions, positions.new_full((missing,), -1)])
