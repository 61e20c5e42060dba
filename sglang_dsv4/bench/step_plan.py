"""The step plan on the device, against the reference in torch."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from dsv4_kernels.step_plan import naive_step_plan, step_buffers
from dsv4_kernels.step_plan.fused import step_plan
from sglang_dsv4.bench.cases import PAGE_TOKENS, Case, plan_cases
from sglang_dsv4.bench.job import OURS, Job, Named, expect_bytes

PEERS = ()
# Bytes that a read of one far-off number moves.
_SECTOR_BYTES = 32
_WRITTEN = ("positions", "token_rows", "seq_lens", "extend_lens", "state_slots", "history_pages", "window_pages")


def bytes_needed(case: Case) -> int:
    """Lengths and rows read and written, tokens written, and per page two far-off numbers read and two written."""
    pages = sum(-(-length // PAGE_TOKENS) for length in case.lengths)
    per_request = 8 + 4 + 8 + 4 * 8
    return len(case.starts) * per_request + case.num_tokens * 16 + pages * (2 * _SECTOR_BYTES + 2 * 8)


def step_plans(case: Case, device: torch.device) -> Iterator[Job]:
    """The plan of a batch as a serving engine describes it, over random pages; tables as long as its longest request.

    The inputs are in the cache: a step's plan follows their upload.
    """
    pages, count = -(-max(case.lengths) // PAGE_TOKENS), len(case.starts)
    order = torch.randperm(count * pages, device=device).view(count, pages, 1)
    slots = order * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=device)
    inputs = {
        "seq_lens": torch.tensor(case.lengths, device=device),
        "extend_lens": torch.tensor(case.extends, dtype=torch.int32, device=device),
        "request_rows": torch.randperm(count, device=device),
        "token_slots": slots.flatten(1).to(torch.int32),
        "window_slots": torch.arange(count * pages * PAGE_TOKENS, device=device).flip(0),
    }
    out = step_buffers(count, case.num_tokens, pages, PAGE_TOKENS, 0, device)
    first_tokens = torch.zeros(count, dtype=torch.int64, device=device)
    fused, naive = (partial(plan, out, first_tokens, **inputs) for plan in (step_plan, naive_step_plan))

    def check() -> dict[str, Any]:
        """The kernel writes what the reference writes, and leaves alone what it leaves alone."""
        found = []
        for plan in (fused, naive):
            tensors = {name: getattr(out, name) for name in _WRITTEN} | {"first_tokens": first_tokens}
            for tensor in tensors.values():
                tensor.fill_(-7)
            plan()
            found.append({name: tensor.clone() for name, tensor in tensors.items()})
        expect_bytes(*found, allowed={})
        return {}

    moved = bytes_needed(case)
    yield Job("step plan", case.name, case.shape, "-", "int", moved, check, {OURS: [fused]}, {"torch": naive})


def jobs(quick: bool, device: torch.device) -> Iterator[Named]:
    """All step plans."""
    for case in plan_cases(quick):
        yield f"step plan {case.name}", partial(step_plans, case, device)
