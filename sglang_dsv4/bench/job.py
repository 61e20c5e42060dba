"""What a row of a benchmark comes from: inputs, a check of ours against the reference, and calls that are timed in turns."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch

from sglang_dsv4.bench.timing import Call, Timing, num_sets, time_eager, time_graphs

OURS = "ours"
_MAX_BYTES = 24 << 30


@dataclass(frozen=True)
class Job:
    """One case of one operation.

    Attributes:
        op (str): the operation.
        case (str): the case, by name.
        shape (str): its shape, for people.
        row_format (str): format of the rows or keys that are written or read.
        input_dtype (str): type of the new tokens' rows; empty where there is but one.
        moved (int): fewest bytes that a call can move.
        check (Callable[[], dict]): raises unless ours gives what the reference gives; returns further columns of the row, by
            variant where each has a row of its own.
        calls (dict[str, Sequence[Call]]): variants by name, each with a call per set of inputs; timed in CUDA graphs.
        eager (dict[str, Call]): what no graph can capture, timed by events.
    """

    op: str
    case: str
    shape: str
    row_format: str
    input_dtype: str
    moved: int
    check: Callable[[], dict[str, Any]]
    calls: dict[str, Sequence[Call]]
    eager: dict[str, Call] = field(default_factory=dict)


# A name to choose jobs by, and what makes them.
Named = tuple[str, Callable[[], Iterator[Job]]]


def measure(job: Job, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Check a job, time it, and yield its rows: one with a column for each peer, or, where no variant is ours, one for each.

    Times are in microseconds a call. ``us`` is the median over rounds, ``p10_us`` and ``p90_us`` bound four fifths of them;
    ``copy_percent`` is the rate at which ``bytes`` moved, in percent of a copy's.

    Args:
        job (Job): what to measure.
        bandwidth (float): bytes per microsecond of a copy on the device.
    """
    facts = job.check()
    times = time_graphs(job.calls) | {name: time_eager(call) for name, call in job.eager.items()}
    names = ("op", "case", "shape", "row_format", "input_dtype")
    shared = {name: getattr(job, name) for name in names} | {"bytes": job.moved}

    def speed(timing: Timing) -> dict[str, float]:
        found = {name.replace("median_us", "us"): value for name, value in asdict(timing).items()}
        return found | {"copy_percent": 100 * job.moved / timing.median_us / bandwidth}

    if OURS in times:
        ours = times.pop(OURS)
        yield shared | speed(ours) | {f"{name}_us": timing.median_us for name, timing in times.items()} | facts
    else:
        for name, timing in times.items():
            yield shared | {"variant": name} | speed(timing) | facts.get(name, {})


def input_sets(make: Callable[[], Any], moved: int, held: int) -> list[Any]:
    """As many sets of inputs as it takes for a call to find nothing in the L2 cache, or as fit into the memory."""
    return [make() for _ in range(min(num_sets(moved), max(2, _MAX_BYTES // held)))]


def expect_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], allowed: dict[str, float]) -> None:
    """Compare tensors byte by byte.

    Args:
        found (dict[str, torch.Tensor]): what a kernel wrote, by name.
        expected (dict[str, torch.Tensor]): what the reference wrote.
        allowed (dict[str, float]): share of a tensor's bytes that may differ; none where it is not named.

    Raises:
        AssertionError: more bytes differ; names the tensor.
    """
    for name, tensor in found.items():
        share = (tensor.view(torch.uint8) != expected[name].view(torch.uint8)).float().mean().item()
        if not share <= allowed.get(name, 0.0):
            raise AssertionError(
                f"{name}: expected at most {100 * allowed.get(name, 0.0):.3g} % of the bytes to differ from the reference, got "
                f"{100 * share:.3g} %"
            )


@cache
def load(module: str) -> tuple[Any, str]:
    """A module that may not be installed, or None and why not."""
    try:
        return importlib.import_module(module), ""
    except ImportError as fault:
        return None, f"{module} cannot be imported: {fault}"
