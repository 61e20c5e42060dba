"""The window store, against the reference."""

from collections.abc import Iterator
from dataclasses import asdict

import torch

from dsv4_kernels.layout import HEAD_DIM, ROW_FORMATS
from dsv4_kernels.window_store import naive_window_store
from dsv4_kernels.window_store.fused import window_store
from sglang_dsv4.bench.cases import Case, decode_case, prefill_case
from sglang_dsv4.bench.flush import FlushRow, differing
from sglang_dsv4.bench.row import speed
from sglang_dsv4.bench.timing import num_sets, time_eager, time_graphs
from sglang_dsv4.bench.work import EPS, make_step, random_rows, rope, zero_pool
from sglang_dsv4.spec import CSA_RATIO

# A norm's sum in another order moves a value by 2^-22 of itself; a rounding to e4m3 or bf16 for one value in 2^13.
_MAX_DIFFERING = 2.0**-12


def run(case: Case, row_format: str, bandwidth: float) -> FlushRow:
    """Check and time one case."""
    device, fmt = torch.device("cuda"), ROW_FORMATS[row_format]
    table = rope(case, device)
    step = make_step(case, device)
    weight = 1 + 0.1 * torch.randn(HEAD_DIM, device=device)
    moved = case.num_tokens * (2 * HEAD_DIM + fmt.row_bytes)
    works = []
    for _ in range(num_sets(moved)):
        kv = random_rows((case.num_tokens, HEAD_DIM), torch.bfloat16, device)
        works.append((kv, zero_pool(fmt, step.num_window_rows, device)))

    def call(kv: torch.Tensor, pool: torch.Tensor) -> None:
        window_store(step, kv, weight, EPS, table, pool, fmt)

    kv, pool = works[0]
    theirs = pool.clone()
    call(kv, pool)
    naive_window_store(step, kv, weight, EPS, table, theirs, fmt)
    share = differing({"pool": pool}, {"pool": theirs})["pool"]
    if share > _MAX_DIFFERING:
        raise AssertionError(f"window store: {100 * share:.3f} % of the bytes differ from the reference")
    times = time_graphs({"ours": [lambda work=work: call(*work) for work in works], "warm": [lambda: call(kv, pool)]})
    eager = time_eager(lambda: naive_window_store(step, kv, weight, EPS, table, theirs, fmt))
    return FlushRow(
        op="window store",
        case=case.name,
        shape=case.describe(),
        row_format=row_format,
        input_dtype="bfloat16",
        **speed(times["ours"], moved, bandwidth),
        torch_us=eager.median_us,
        warm_us=times["warm"].median_us,
    )


def rows(bandwidth: float, quick: bool, only: str) -> Iterator[dict]:
    """Every case whose op and name contain ``only``."""
    cases = [decode_case(batch, CSA_RATIO, False) for batch in (1, 256)]
    cases += [prefill_case(tokens) for tokens in ((8192,) if quick else (1024, 8192, 32768))]
    for case in cases:
        for row_format in ("fp8_584",) if quick else ("fp8_584", "bf16"):
            if only in f"window store {case.name}":
                yield asdict(run(case, row_format, bandwidth))
