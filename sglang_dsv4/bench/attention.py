"""Attention of one layer: FlashInfer with its planner and with ours, FlashMLA, and the reference."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from dsv4_kernels.memory import empty
from dsv4_kernels.sparse_attention import naive_sparse_attention
from dsv4_kernels.sparse_attention.bound import Exact, exact, worst
from sglang_dsv4.attention import EagerAttention, make_attention
from sglang_dsv4.attention.base import Attention
from sglang_dsv4.bench import peer_flashmla
from sglang_dsv4.bench.job import Job, Named, load
from sglang_dsv4.bench.timing import Call, num_sets, time_graphs
from sglang_dsv4.check.attention_work import RATIOS, SCALE, AttentionCase, AttentionWork

Calls = dict[str, list[Callable[[], torch.Tensor]]]

_MAX_POOL_BYTES = 6 << 30
_MAX_LAYERS = 96
_FEWEST_PREFILL = 64
_MOST_DROPPED = 1200  # keys of a query that are left out one after another
BATCHES = (1, 8, 32, 64, 128, 256)
_FLASHINFER = "sglang_dsv4.attention.flashinfer"
PEERS = (_FLASHINFER, peer_flashmla.MODULE)


def decode(kind: str, context: int, heads: int, topk: int, batch: int) -> AttentionCase:
    """One new token of each request."""
    return AttentionCase(kind, (context - 1,) * batch, (1,) * batch, heads, topk)


def cases(quick: bool) -> list[tuple[AttentionCase, str]]:
    """What is measured: a case and a row format."""

    def decodes(*table: tuple[str, int, int, int, str]) -> list[tuple[AttentionCase, str]]:
        batches = (8, 128) if quick else BATCHES
        return [(decode(*row, batch), name) for *row, formats in table for batch in batches for name in formats.split()]

    lengths = (2048,) if quick else (512, 2048, 8192, 16384)
    found = [
        *decodes(
            ("csa", 8192, 64, 512, "bf16 fp8_584"), ("window", 8192, 64, 512, "bf16"), ("hca", 131072, 64, 512, "bf16 fp8_584")
        ),
        *((AttentionCase(kind, (0,), (tokens,)), "bf16") for tokens in lengths for kind in RATIOS),
        *decodes(("csa", 8192, 128, 1024, "bf16"), ("hca", 8192, 64, 512, "bf16")),
    ]
    if quick:
        return found
    mixed = tuple(1000 + 130_000 * (i % 8 == 0) + 17 * i for i in range(64))
    return [
        *found,
        *((decode("csa", 8192, 64, 512, batch), "bf16") for batch in (2, 4, 16, 67, 100, 160, 200)),
        (AttentionCase("hca", mixed, (1,) * 64), "bf16"),
        *((decode("hca", 1 << 20, 64, 512, batch), "bf16") for batch in (1, 8, 64)),
        (AttentionCase("hca", (1 << 20,), (1024,)), "bf16"),
        *((AttentionCase("csa", (32768,), (2048,)), row_format) for row_format in ("bf16", "fp8_584")),
        *decodes(("window", 8192, 128, 512, "bf16"), ("hca", 131072, 128, 512, "bf16"), ("csa", 8192, 64, 1024, "bf16")),
    ]


def make_work(case: AttentionCase, row_format: str, device: torch.device) -> AttentionWork:
    """As many layers as it takes to leave the L2 cache between two calls of one."""
    ratio = RATIOS[case.kind]
    entries = len(case.starts) * (case.longest // ratio if ratio else 0)
    queries = 2048 * case.heads * case.num_tokens
    listed = {"window": 128, "csa": 128 + case.topk, "hca": 128 + case.longest // 128}[case.kind]
    moved = 584 * listed * len(case.starts) + queries
    layers = min(num_sets(moved), _MAX_LAYERS, _MAX_POOL_BYTES // (1024 * entries + queries))
    return AttentionWork(case, max(2, layers), row_format, device)


def flashinfer_variants(work: AttentionWork) -> dict[str, Any]:
    """Our attention, planned, by backend and schedule."""
    module, _ = load(_FLASHINFER)
    if module is None:
        return {}
    found: dict[str, Attention] = {}
    for backend in ("fa3", "fa2") if torch.cuda.get_device_capability()[0] == 9 else ("fa2",):
        for schedule in ("own", "stock") if found else ("own", "whole", "stock"):
            options = {"backend": backend, "schedule": schedule, "prefill": "flashinfer"}
            found[f"{backend}-{schedule}"] = module.FlashInferAttention(work.cache, work.case.heads, **options)
            found[f"{backend}-{schedule}"].begin(work.plan, work.lengths)
    return found


def variants(work: AttentionWork, planned: dict[str, Any]) -> Calls:
    """Calls by name, one per layer; all but the ones named ``kernel`` give the same result.

    ``direct``: the chosen rows were written where the kernel reads them, as `Attention.selected_buffer` allows; FlashMLA's
    lists are ready too. ``chosen``: what `make_attention` makes.
    """
    layers, case = range(len(work.q)), work.case
    calls: Calls = {}
    for name, attention in planned.items():
        calls[name] = run(attention, work, work.selected)
        calls[f"{name} kernel"] = launches(attention, work)
        if case.kind == "csa" and name.endswith("own"):
            calls[f"{name} direct"] = run(attention, work, [write_selected(attention, work)] * len(layers))
    chosen, _ = make_attention(None, work.cache, case.heads)
    if not isinstance(chosen, EagerAttention):
        chosen.begin(work.plan, work.lengths)
        calls["chosen"] = run(chosen, work, [work.selected_by(i, chosen.numbering) for i in layers])
    packed = work.cache.spec.row_format == "fp8_584"
    module, _ = load(peer_flashmla.MODULE)
    if module is not None and (packed or case.num_tokens >= _FEWEST_PREFILL):
        peer = peer_flashmla.decode if packed else peer_flashmla.prefill
        for name, undo_rope in (("direct", True), ("kernel", False)):
            calls[f"flashmla {name}"] = [peer(module.flash_mla, work, i, undo_rope=undo_rope) for i in layers]
    return calls


def write_selected(attention: Attention, work: AttentionWork) -> torch.Tensor:
    """The chosen rows of the first layer, in the buffer that the attention offers."""
    place, chosen = attention.selected_buffer(work.cache.layers[0]), work.selected[0]
    assert place is not None and chosen is not None
    wanted = work.kind.num_entries(work.plan.step.positions).unsqueeze(1)
    valid = torch.arange(place.shape[1], device=place.device) < wanted
    place.copy_(torch.where(valid, chosen[:, : place.shape[1]], place))
    return place


def launches(attention: Any, work: AttentionWork) -> list[Callable[[], torch.Tensor]]:
    """FlashInfer's launch alone."""
    out = empty(tuple(work.q[0].shape), torch.bfloat16, work.sink.device)
    lse = empty(tuple(out.shape[:2]), torch.float32, out.device)

    def call(layer_id: int) -> torch.Tensor:
        pool, q = work.cache.layers[layer_id].pool, work.q[layer_id]
        for chunk in attention.chunks[work.kind.name]:
            part = chunk.tokens
            attention.attend(work.kind, chunk, pool, q[part], out[part], lse[part])
        return out

    return [partial(call, i) for i in range(len(work.q))]


def run(attention: Attention, work: AttentionWork, selected: list[torch.Tensor | None]) -> list[Callable[[], torch.Tensor]]:
    """All of it, sink and inverse rotation included."""
    return [
        partial(attention.run, layer, q, work.sink, rows, undo_rope=True)
        for layer, q, rows in zip(work.cache.layers, work.q, selected, strict=True)
    ]


def expected(work: AttentionWork) -> dict[int, Exact]:
    """The first layer's first, middle and last query in fp64.

    Raises:
        AssertionError: a key could be missing unnoticed.
    """
    last = work.case.num_tokens - 1
    found = {}
    for query in sorted({0, last // 2, last}):
        rows, angles = work.rows(0, query), work.cache.layers[0].rope_table[work.plan.step.positions[query]]
        drop = query == last and len(rows) <= _MOST_DROPPED
        found[query] = exact(work.q[0][query], rows, work.sink, SCALE, angles, drop=drop)
        if not found[query].dropped_least > 2:
            raise AssertionError(
                f"{work.case.name}: a dropped key moves values by {found[query].dropped_least} of what is allowed"
            )
    return found


def check(work: AttentionWork, calls: Calls, planned: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Largest error of each variant in units of what is allowed, and what its planning takes.

    Raises:
        AssertionError: an error that is not allowed.
    """
    queries, facts = expected(work), {}
    for name, layers in calls.items():
        if not name.endswith("kernel"):
            found = layers[0]()
            facts[name] = {"error": max(worst(found[query], exactly) for query, exactly in queries.items())}
            if not facts[name]["error"] <= 1:
                raise AssertionError(
                    f"{work.case.name} {name}: expected 1 or less of the allowed error, got {facts[name]['error']}"
                )
    for name, attention in planned.items():
        facts[name] |= plan_times(work, attention)
    return facts


def plan_times(work: AttentionWork, attention: Any) -> dict[str, float]:
    """Microseconds of one step's planning: on the host, and on the device where it can be captured."""
    plan: Call = partial(attention.begin, work.plan, work.lengths)
    samples = []
    for _ in range(15):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        plan()
        samples.append(1e6 * (time.perf_counter() - begin))
    found = {"plan_host_us": float(np.median(samples))}
    if attention.schedule in ("own", "whole"):
        found["plan_device_us"] = time_graphs({"plan": [plan]})["plan"].median_us
    return found


def attend(case: AttentionCase, row_format: str, device: torch.device) -> Iterator[Job]:
    """Every variant of one case; torch where it does not take minutes."""
    work = make_work(case, row_format, device)
    planned = flashinfer_variants(work)
    calls = variants(work, planned)
    layer, eager = work.cache.layers[0], {}
    if case.num_tokens <= 64 and case.longest <= 8192:
        operands = (work.q[0], layer.pool, layer.row_format, work.indices(0), work.sink, SCALE)
        eager["torch"] = partial(naive_sparse_attention, *operands)
    shape = f"{len(case.starts)} requests, {case.num_tokens} tokens, {len(work.q)} layers"
    checked = partial(check, work, calls, planned)
    yield Job("attention", case.name, shape, row_format, "", work.bytes_needed(), checked, calls, eager)


def jobs(quick: bool, device: torch.device) -> Iterator[Named]:
    """All cases."""
    for case, row_format in cases(quick):
        yield f"{case.name} {row_format}", partial(attend, case, row_format, device)
