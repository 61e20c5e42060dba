"""Attention of one layer: FlashInfer with its planner and with ours, FlashMLA, and the reference."""

import importlib
import time
from collections.abc import Callable, Iterator

import torch

from dsv4_kernels.memory import empty
from dsv4_kernels.sparse_attention import naive_sparse_attention
from sglang_dsv4.attention import EagerAttention, make_attention
from sglang_dsv4.attention.base import Attention
from sglang_dsv4.bench import attention_peers
from sglang_dsv4.bench.attention_check import exact, worst
from sglang_dsv4.bench.attention_work import RATIOS, AttentionCase, AttentionWork
from sglang_dsv4.bench.timing import num_sets, time_eager, time_graphs

Calls = dict[str, list[Callable[[], torch.Tensor]]]

_MAX_POOL_BYTES = 6 << 30
_MAX_LAYERS = 96
_CHECKED_QUERIES = 3
_FEWEST_PREFILL = 64
BATCHES = (1, 8, 32, 64, 128, 256)
_FLASHINFER = "sglang_dsv4.attention.flashinfer"


def cases(quick: bool) -> list[tuple[AttentionCase, str]]:
    """What is measured: a case and a row format."""
    found: list[tuple[AttentionCase, str]] = []

    def decode(kind: str, context: int, heads: int, topk: int = 512, formats: str = "bf16") -> None:
        batches = (8, 128) if quick else BATCHES
        for batch in batches:
            case = AttentionCase(kind, (context - 1,) * batch, (1,) * batch, heads, topk)
            found.extend((case, name) for name in formats.split())

    decode("csa", 8192, 64, formats="bf16 fp8_584")
    decode("window", 8192, 64)
    decode("hca", 131072, 64, formats="bf16 fp8_584")
    for tokens in (2048,) if quick else (512, 2048, 8192, 16384):
        for kind in ("window", "csa", "hca"):
            found.append((AttentionCase(kind, (0,), (tokens,)), "bf16"))
    decode("csa", 8192, 128, 1024)
    decode("hca", 8192, 64)
    if quick:
        return found
    for batch in (2, 4, 16, 67, 100, 160, 200):
        found.append((AttentionCase("csa", (8191,) * batch, (1,) * batch), "bf16"))
    mixed = tuple(1000 + 130_000 * (i % 8 == 0) + 17 * i for i in range(64))
    found.append((AttentionCase("hca", mixed, (1,) * 64), "bf16"))
    for batch in (1, 8, 64):
        found.append((AttentionCase("hca", ((1 << 20) - 1,) * batch, (1,) * batch), "bf16"))
    found.append((AttentionCase("hca", (1 << 20,), (1024,)), "bf16"))
    found.append((AttentionCase("csa", (32768,), (2048,)), "bf16"))
    found.append((AttentionCase("csa", (32768,), (2048,)), "fp8_584"))
    decode("window", 8192, 128)
    decode("hca", 131072, 128)
    decode("csa", 8192, 64, 1024)
    return found


def make_work(case: AttentionCase, row_format: str, device: torch.device) -> AttentionWork:
    """As many layers as it takes to leave the L2 cache between two calls of one."""
    ratio = RATIOS[case.kind]
    entries = len(case.starts) * (case.longest // ratio if ratio else 0)
    queries = 2048 * case.heads * case.num_tokens
    listed = {"window": 128, "csa": 128 + case.topk, "hca": 128 + case.longest // 128}[case.kind]
    moved = 584 * listed * len(case.starts) + queries
    layers = min(num_sets(moved), _MAX_LAYERS, _MAX_POOL_BYTES // (1024 * entries + queries))
    return AttentionWork(case, max(2, layers), row_format, device)


def flashinfer_variants(work: AttentionWork, missing: set[str]) -> dict[str, Attention]:
    """Our attention, planned, by backend and schedule."""
    try:
        ours = importlib.import_module(_FLASHINFER).FlashInferAttention
    except ImportError as fault:
        missing.add(f"FlashInfer cannot be imported: {fault}")
        return {}
    found: dict[str, Attention] = {}
    hopper = torch.cuda.get_device_capability()[0] == 9
    for backend in ("fa3", "fa2") if hopper else ("fa2",):
        for schedule in ("own", "stock") if found else ("own", "whole", "stock"):
            attention = ours(work.cache, work.case.heads, backend=backend, schedule=schedule, prefill="flashinfer")
            attention.begin(work.plan, work.lengths)
            found[f"{backend}-{schedule}"] = attention
    return found


def variants(work: AttentionWork, missing: set[str]) -> tuple[Calls, dict[str, Attention]]:
    """Calls by name, one per layer; all but the ones named ``kernel`` give the same result.

    ``direct``: the chosen rows were written where the kernel reads them, as `Attention.selected_buffer` allows; FlashMLA's
    lists are ready too. ``chosen``: what `make_attention` makes.
    """
    layers = range(len(work.q))
    calls: Calls = {}
    planned = flashinfer_variants(work, missing)
    for name, attention in planned.items():
        calls[name] = _calls(attention, work, work.selected)
        calls[f"{name} kernel"] = _kernels(attention, work)
        if work.case.kind == "csa" and name.endswith("own"):
            place = attention.selected_buffer(work.cache.layers[0])
            assert place is not None and work.selected[0] is not None
            wanted = work.kind.num_entries(work.plan.step.positions).unsqueeze(1)
            valid = torch.arange(place.shape[1], device=place.device) < wanted
            place.copy_(torch.where(valid, work.selected[0][:, : place.shape[1]], place))
            calls[f"{name} direct"] = _calls(attention, work, [place] * len(work.q))
    chosen, _ = make_attention(None, work.cache, work.case.heads)
    if not isinstance(chosen, EagerAttention):
        chosen.plan(work.plan, work.lengths)
        selected = [work.selected_by(i, chosen.numbering) for i in range(len(work.q))]
        calls["chosen"] = _calls(chosen, work, selected)
    tokens = work.case.num_tokens
    if work.case.kind == "hca" and len(work.case.starts) == 1 < tokens and planned:
        shared = importlib.import_module("sglang_dsv4.bench.attention_shared")
        backend = next(iter(planned)).split("-")[0]
        calls[f"{backend}-shared"] = shared.prepare(work, backend)
    module, fault = attention_peers.load()
    if module is None:
        missing.add(fault)
        return calls, planned
    packed = work.cache.spec.row_format == "fp8_584"
    if packed or tokens >= _FEWEST_PREFILL:
        peer = attention_peers.decode if packed else attention_peers.prefill
        calls["flashmla direct"] = [peer(module, work, i, undo_rope=True) for i in layers]
        calls["flashmla kernel"] = [peer(module, work, i, undo_rope=False) for i in layers]
    return calls, planned


def _kernels(attention: Attention, work: AttentionWork) -> list[Callable[[], torch.Tensor]]:
    """FlashInfer's launch alone."""
    out = empty(tuple(work.q[0].shape), torch.bfloat16, work.sink.device)
    lse = empty(tuple(out.shape[:2]), torch.float32, out.device)

    def call(layer_id: int) -> torch.Tensor:
        pool, q = work.cache.layers[layer_id].pool, work.q[layer_id]
        for chunk in attention.chunks[work.kind.name]:  # type: ignore[attr-defined]
            part = chunk.tokens
            attention.attend(work.kind, chunk, pool, q[part], out[part], lse[part])  # type: ignore[attr-defined]
        return out

    return [lambda i=i: call(i) for i in range(len(work.q))]  # type: ignore[misc]


def _calls(attention: Attention, work: AttentionWork, selected: list[torch.Tensor | None]) -> list[Callable[[], torch.Tensor]]:
    return [
        lambda i=i: attention.run(work.cache.layers[i], work.q[i], work.sink, selected[i], undo_rope=True)  # type: ignore[misc]
        for i in range(len(work.q))
    ]


def check(work: AttentionWork, calls: Calls) -> dict[str, float]:
    """Largest error of each variant in units of what is allowed.

    Raises:
        AssertionError: an error that is not allowed, or a key that could be missing unnoticed.
    """
    table = work.cache.layers[0].rope_table
    last = work.case.num_tokens - 1
    queries = sorted({0, last // 2, last})[:_CHECKED_QUERIES]
    expected = {}
    for query in queries:
        angles = table[work.plan.step.positions[query]]
        rows = work.rows(0, query)
        expected[query] = exact(work.q[0][query], rows, work.sink, 512**-0.5, angles, drop=query == last and len(rows) <= 1200)
        if expected[query].dropped_least <= 2:
            raise AssertionError(
                f"{work.case.name}: a dropped key moves values by {expected[query].dropped_least} of what is allowed"
            )
    errors = {}
    for name, layers in calls.items():
        if name.endswith("kernel"):
            continue
        found = layers[0]()
        errors[name] = max(worst(found[query], expected[query]) for query in queries)
        if not errors[name] <= 1:
            raise AssertionError(f"{work.case.name} {name}: {errors[name]} times the allowed error")
    return errors


def plan_times(work: AttentionWork, attention: Attention) -> dict[str, float]:
    """Microseconds of one step's planning: on the host, and on the device where it can be captured."""
    samples = []
    for _ in range(15):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        attention.begin(work.plan, work.lengths)
        samples.append(1e6 * (time.perf_counter() - begin))
    found = {"plan_host_us": sorted(samples)[len(samples) // 2]}
    if getattr(attention, "schedule", "") in ("own", "whole"):
        calls = [lambda: attention.begin(work.plan, work.lengths)]
        found["plan_device_us"] = time_graphs({"plan": calls})["plan"].median_us
    return found


def measure(case: AttentionCase, row_format: str, bandwidth: float, missing: set[str]) -> Iterator[dict]:
    """Check and time every variant of one case."""
    device = torch.device("cuda")
    work = make_work(case, row_format, device)
    calls, planned = variants(work, missing)
    errors = check(work, calls)
    times = time_graphs(calls)
    moved = work.bytes_needed()
    for name, timing in times.items():
        row = {
            "op": "attention",
            "case": case.name,
            "kind": case.kind,
            "heads": case.heads,
            "tokens": case.num_tokens,
            "requests": len(case.starts),
            "longest": case.longest,
            "topk": case.topk,
            "row_format": row_format,
            "variant": name,
            "us": timing.median_us,
            "p10_us": timing.p10_us,
            "p90_us": timing.p90_us,
            "bytes": moved,
            "copy_percent": 100 * moved / timing.median_us / bandwidth,
            "error": errors.get(name),
            "layers": len(work.q),
        }
        if name in planned:
            row |= plan_times(work, planned[name])
        yield row
    if case.num_tokens <= 64 and case.longest <= 8192:
        indices = work.indices(0)
        pool, fmt = work.cache.layers[0].pool, work.cache.spec.rows
        timing = time_eager(lambda: naive_sparse_attention(work.q[0], pool, fmt, indices, work.sink, 512**-0.5))
        yield {"op": "attention", "case": case.name, "row_format": row_format, "variant": "torch", "us": timing.median_us}


def rows(bandwidth: float, quick: bool, only: str, missing: set[str]) -> Iterator[dict]:
    """Every case whose name contains ``only``."""
    for case, row_format in cases(quick):
        if only in f"{case.name} {row_format}":
            yield from measure(case, row_format, bandwidth, missing)
            torch.cuda.empty_cache()
