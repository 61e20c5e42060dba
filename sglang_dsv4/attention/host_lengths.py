"""A step's lengths on the host, for schedules that are made there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_dsv4.cache import StepPlan


@dataclass(frozen=True)
class HostLengths:
    """The lengths of `StepTensors` as numbers, so that nobody has to ask the device for them.

    Attributes:
        seq_lens (Sequence[int]): tokens per request, this step included.
        extend_lens (Sequence[int]): new tokens per request.
    """

    seq_lens: Sequence[int]
    extend_lens: Sequence[int]

    def positions(self) -> torch.Tensor:
        """Position of each new token: ``[T]`` int64 on the CPU."""
        ranges = [torch.arange(end - count, end) for end, count in zip(self.seq_lens, self.extend_lens, strict=True)]
        return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)


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
