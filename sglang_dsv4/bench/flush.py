"""The flush of CSA and HCA layers, against the reference and against SGLang."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from sglang_dsv4.bench import peer_sglang
from sglang_dsv4.bench.cases import Case, cases
from sglang_dsv4.bench.row import Row, speed
from sglang_dsv4.bench.timing import count_launches, num_sets, time_eager, time_graphs
from sglang_dsv4.bench.work import FlushWork, bytes_needed, make_flush_work, make_step, rope
from sglang_dsv4.spec import CSA_RATIO, HCA_RATIO

_MAX_BYTES = 24 << 30
_MAX_DIFFERING = 2.0**-9


@dataclass(frozen=True)
class FlushRow(Row):
    """A flush.

    Attributes:
        sglang_same_bytes (float | None): share of the entries' bytes that SGLang's kernels write alike.
        warm_us, sglang_warm_us (float | None): with inputs and states that are still in the L2 cache.
        launches, sglang_launches (int | None): kernels a call.
    """

    sglang_same_bytes: float | None = None
    warm_us: float | None = None
    sglang_warm_us: float | None = None
    launches: int | None = None
    sglang_launches: int | None = None


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Share of bytes that differ, per tensor."""
    shares = {}
    for name, tensor in found.items():
        ours, theirs = tensor.view(torch.uint8), expected[name].view(torch.uint8)
        shares[name] = (ours != theirs).float().mean().item()
    return shares


def check(work: FlushWork) -> None:
    """Raise unless the kernel writes what the reference writes.

    States are copies of inputs and must be equal. A pooled value may be off by about 2^-18 of its row's largest value (the
    exponentials); an e4m3 or bf16 rounding with 3 or 8 bits moves for at most 2^-18 * 2^9 = 1 in 512 of such values.
    """
    ours, theirs = work.copy(), work.copy()
    ours.fused()
    theirs.naive()
    torch.cuda.synchronize()
    found = differing(ours.outputs(), theirs.outputs())
    if work.main.boundary is work.main.streams:
        # HCA accumulators are sums, not copies, and the one after a block's last token is not kept; entries show them.
        found = {name: share for name, share in found.items() if name == "main pool"}
    for name, share in found.items():
        allowed = _MAX_DIFFERING if name.endswith("pool") else 0.0
        if share > allowed:
            raise AssertionError(
                f"{name}: {100 * share:.3f} % of the bytes differ from the reference, allowed {100 * allowed} %"
            )


def run(layer: str, case: Case, row_format: str, dtype: torch.dtype, bandwidth: float, module: object | None) -> FlushRow:
    """Check and time one case."""
    device = torch.device("cuda")
    table = rope(case, device)
    step = make_step(case, device)
    first = make_flush_work(case, layer, row_format, dtype, step, table)
    check(first)
    moved = bytes_needed(case, first)
    held = sum(tensor.numel() * tensor.element_size() for tensor in first.outputs().values()) + moved
    count = min(num_sets(moved), max(2, _MAX_BYTES // held))
    works = [first] + [make_flush_work(case, layer, row_format, dtype, step, table) for _ in range(count - 1)]
    variants = {"ours": [work.fused for work in works], "warm": [first.fused]}
    same = None
    if module is not None and dtype == torch.float32 and row_format == "fp8_584":
        prepared = [peer_sglang.prepare(module, case, work) for work in works]
        variants["sglang"] = [call for call, _ in prepared]
        variants["sglang warm"] = variants["sglang"][:1]
        if not any(case.starts) and row_format == "fp8_584" and layer != "hca":
            prepared[0][0]()
            first.fused()
            mine = first.main.pool.flatten()[-prepared[0][1][0].pool.numel() :]
            same = (mine == prepared[0][1][0].pool.flatten()).float().mean().item()
    times = time_graphs(variants)
    eager = time_eager(first.naive)
    theirs, warm = times.get("sglang"), times.get("sglang warm")
    return FlushRow(
        op=f"flush {layer}",
        case=case.name,
        shape=case.describe(),
        row_format=row_format,
        input_dtype=str(dtype).removeprefix("torch."),
        **speed(times["ours"], moved, bandwidth),
        sglang_us=None if theirs is None else theirs.median_us,
        torch_us=eager.median_us,
        sglang_same_bytes=same,
        warm_us=times["warm"].median_us,
        sglang_warm_us=None if warm is None else warm.median_us,
        launches=count_launches(first.fused),
        sglang_launches=None if theirs is None else count_launches(variants["sglang"][0]),
    )


def rows(bandwidth: float, quick: bool, only: str) -> Iterator[dict]:
    """Every case whose op and name contain ``only``; some of them also with bf16 rows and with bf16 inputs.

    A compressor has the same shape in Flash and in Pro: these rows are for both.
    """
    module, _ = peer_sglang.load()
    for layer, ratio in (("csa", CSA_RATIO), ("csa-main", CSA_RATIO), ("hca", HCA_RATIO)):
        for case in cases(ratio, quick):
            kinds = [("fp8_584", torch.float32)]
            if case.name in ("decode-b256-mixed", "prefill-1x8192") and layer != "csa-main":
                kinds += [("bf16", torch.float32), ("fp8_584", torch.bfloat16)]
            for row_format, dtype in kinds:
                if only in f"flush {layer} {case.name}":
                    yield asdict(run(layer, case, row_format, dtype, bandwidth, module))
                    torch.cuda.empty_cache()
