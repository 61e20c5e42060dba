"""Times of short kernels: CUDA graphs over inputs that have left the L2 cache, variants taking turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_dsv4.errors import UnsupportedError

Call = Callable[[], object]

# Bytes that pass between two uses of one input set; twice the L2 cache of an H200.
_ROTATED_BYTES = 120 << 20
_MAX_SETS = 256
_MIN_CALLS = 64
_ROUNDS = 9


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median of the rounds, and the times that a tenth of them fell below and rose above."""

    median_us: float
    p10_us: float
    p90_us: float


def need_cuda(what: str) -> torch.device:
    """The GPU to measure on.

    Args:
        what (str): the benchmark.

    Raises:
        UnsupportedError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(f"{what}: expected a CUDA device, found none; nothing was run")
    return torch.device("cuda")


def num_sets(bytes_per_call: int) -> int:
    """Input sets to rotate over so that a call finds none of its bytes in the L2 cache, as far as memory allows."""
    return max(2, min(_MAX_SETS, -(-_ROTATED_BYTES // max(1, bytes_per_call))))


def capture(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that makes the calls one after another, in turn until there are enough of them; and their number."""
    repeats = -(-_MIN_CALLS // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    return graph, repeats * len(calls)


def _elapsed_us(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * float(start.elapsed_time(end))


def time_eager(call: Call, rounds: int = 3) -> Timing:
    """Time a call that cannot be captured, by events around it."""
    call()
    return summary([_elapsed_us(call) for _ in range(rounds)])


def time_graphs(variants: dict[str, Sequence[Call]]) -> dict[str, Timing]:
    """Time variants of one piece of work; they take turns, so that a drift of the clocks affects all of them.

    Args:
        variants (dict): name to calls, one per input set.
    """
    graphs = {name: capture(calls) for name, calls in variants.items()}
    for graph, _ in graphs.values():
        graph.replay()
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(_ROUNDS):
        for name, (graph, count) in graphs.items():
            samples[name].append(_elapsed_us(graph.replay) / count)
    return {name: summary(values) for name, values in samples.items()}


def count_launches(call: Call) -> int:
    """Kernels that a call launches, as a profiler sees them."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == device for event in profile.events())


def copy_bandwidth() -> float:
    """Bytes per microsecond that a copy of 4 GiB on the device moves, reading and writing both counted."""
    source = torch.zeros(1 << 30, device="cuda").uniform_()
    target = torch.zeros_like(source)
    timing = time_eager(lambda: target.copy_(source), rounds=9)
    return 2 * source.numel() * source.element_size() / timing.median_us


def summary(samples: Sequence[float]) -> Timing:
    """The times of all rounds, summed up."""
    return Timing(*map(float, np.quantile(samples, (0.5, 0.1, 0.9))))
