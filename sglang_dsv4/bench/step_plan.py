"""The step plan on the device, against the reference in torch."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from dsv4_kernels.step import StepTensors
from dsv4_kernels.step_plan import naive_step_plan, step_buffers
from dsv4_kernels.step_plan.fused import step_plan
from sglang_dsv4.bench.cases import PAGE_TOKENS, Case, prefill_case
from sglang_dsv4.bench.row import Row, speed
from sglang_dsv4.bench.timing import time_eager, time_graphs

# Bytes that a read of one far-off number moves.
_SECTOR_BYTES = 32


@dataclass
class PlanWork:
    """A batch as a serving engine describes it, and the buffers of its step."""

    inputs: dict[str, torch.Tensor]
    out: StepTensors
    first_tokens: torch.Tensor

    def fused(self) -> None:
        """The kernel."""
        step_plan(self.out, self.first_tokens, **self.inputs)

    def naive(self) -> None:
        """The reference."""
        naive_step_plan(self.out, self.first_tokens, **self.inputs)

    def outputs(self) -> list[torch.Tensor]:
        """All that is written."""
        step = self.out
        return [
            step.positions,
            step.token_rows,
            step.seq_lens,
            step.extend_lens,
            step.state_slots,
            step.history_pages,
            step.window_pages,
            self.first_tokens,
        ]

    def check(self) -> None:
        """Raise unless the kernel writes what the reference writes, and leaves alone what it leaves alone."""
        found = []
        for plan in (self.fused, self.naive):
            for tensor in self.outputs():
                tensor.fill_(-7)
            plan()
            found.append([tensor.clone() for tensor in self.outputs()])
        for number, (ours, theirs) in enumerate(zip(*found, strict=True)):
            if not torch.equal(ours, theirs):
                raise AssertionError(f"step plan: output {number} differs from the reference")


def make_plan_work(case: Case, device: torch.device) -> PlanWork:
    """Random pages for every request; tables as long as its longest."""
    pages = -(-max(case.lengths) // PAGE_TOKENS)
    count = case.num_requests
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
    return PlanWork(inputs, out, torch.zeros(count, dtype=torch.int64, device=device))


def bytes_needed(case: Case) -> int:
    """Lengths and rows read and written, tokens written, and per page two far-off numbers read and two written."""
    pages = sum(-(-length // PAGE_TOKENS) for length in case.lengths)
    per_request = 8 + 4 + 8 + 4 * 8
    return case.num_requests * per_request + case.num_tokens * 16 + pages * (2 * _SECTOR_BYTES + 2 * 8)


def cases(quick: bool) -> list[Case]:
    """Decode of short and long sequences, and prefill."""
    sizes = [(1, 8), (256, 8)] if quick else [(1, 8), (1, 1024), (32, 32), (128, 8), (256, 8), (64, 128)]
    found = [Case(f"decode-b{b}-{size}k", tuple(1024 * size - 1 - 37 * i for i in range(b)), (1,) * b) for b, size in sizes]
    return [*found, prefill_case(8192), prefill_case(8192, 16), prefill_case(32768)]


def rows(bandwidth: float, quick: bool, only: str) -> Iterator[dict]:
    """Every case whose op and name contain ``only``. The inputs are in the cache: a step's plan follows their upload."""
    for case in cases(quick):
        if only not in f"step plan {case.name}":
            continue
        work = make_plan_work(case, torch.device("cuda"))
        work.check()
        ours = time_graphs({"ours": [work.fused]})["ours"]
        row = Row(
            op="step plan",
            case=case.name,
            shape=case.describe(),
            row_format="-",
            input_dtype="int",
            **speed(ours, bytes_needed(case), bandwidth),
            torch_us=time_eager(work.naive, rounds=9).median_us,
        )
        yield asdict(row)
