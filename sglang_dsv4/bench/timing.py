"""Times of short kernels: CUDA graphs over inputs that have left the L2 cache, variants taking turns."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Bytes that pass between two uses of one input set; twice the L2 cache of an H200.
_ROTATED_BYTES = 120 << 20
_MAX_SETS = 256
_MIN_CALLS = 64
_ROUNDS = 9


@dataclass(frozen=True)
class Timing:
    """Microseconds per call."""

    median_us: float
    p10_us: float
    p90_us: float


def num_sets(bytes_per_call: int) -> int:
    """Input sets to rotate over so that a call finds none of its bytes in the L2 cache, as far as memory allows."""
    return max(2, min(_MAX_SETS, -(-_ROTATED_BYTES // max(1, bytes_per_call))))


def capture(calls: Sequence[Callable[[], None]]) -> tuple[torch.cuda.CUDAGraph, int]:
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


def time_eager(call: Callable[[], None], rounds: int = 3) -> Timing:
    """Time a call that cannot be captured, by events around it."""
    call()
    samples = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        samples.append(1e3 * start.elapsed_time(end))
    return _summary(samples)


def time_graphs(variants: dict[str, Sequence[Callable[[], None]]]) -> dict[str, Timing]:
    """Time variants of one piece of work; they take turns, so that a drift of the clocks meets all alike.

    Args:
        variants (dict): name to calls, one per input set.
    """
    graphs = {name: capture(calls) for name, calls in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for graph, _ in graphs.values():
        graph.replay()
    for _ in range(_ROUNDS):
        for name, (graph, count) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(1e3 * start.elapsed_time(end) / count)
    return {name: _summary(values) for name, values in samples.items()}


def count_launches(call: Callable[[], None]) -> int:
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


def _summary(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])
