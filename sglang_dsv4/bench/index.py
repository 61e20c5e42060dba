"""The selection of CSA entries, whole and by its halves, against torch, SGLang, DeepGEMM and FlashInfer."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from dsv4_kernels.layout import INDEX_FORMATS
from sglang_dsv4.bench.cases import Case, prefill_case
from sglang_dsv4.bench.index_work import IndexWork, make_index_work
from sglang_dsv4.bench.peer_index import scores_peer, topk_peers
from sglang_dsv4.bench.row import Row, speed
from sglang_dsv4.bench.timing import num_sets, time_eager, time_graphs
from sglang_dsv4.bench.work import make_step, rope

_MAX_BYTES = 24 << 30
HEADS = 64
TOPK = {"flash": 512, "pro": 1024}


@dataclass(frozen=True)
class IndexRow(Row):
    """The whole selection (``index select``), or one half of its last piece (``index scores``, ``index topk``).

    Attributes:
        sglang_v2_us (float | None): SGLang's second kernel for the choice, the one that it uses.
        flashinfer_us, flashinfer_exact_us (float | None): FlashInfer's choice, as it comes and with ties as we break them.
        torch_exact_us (float | None): torch's, with ties as we break them.
    """

    sglang_v2_us: float | None = None
    flashinfer_us: float | None = None
    flashinfer_exact_us: float | None = None
    torch_exact_us: float | None = None


def cases(quick: bool) -> list[Case]:
    """Decode from 2k to 1M tokens, verify, prefill from 0, after a prefix, and of many requests; lengths that differ."""
    sizes = [(1, 2), (1, 8), (1, 32), (1, 128), (1, 1024), (8, 32), (8, 128), (32, 32), (64, 32), (128, 8), (256, 8)]
    if quick:
        sizes = [(1, 8), (1, 1024), (32, 32), (256, 8)]
    found = [
        Case(f"decode-b{batch}-{size}k", tuple(1024 * size - 1 - 37 * i for i in range(batch)), (1,) * batch)
        for batch, size in sizes
    ]
    uneven = (512 * 1024 - 1, *(2048 + 97 * i for i in range(63)))
    found += [
        Case("decode-b64-one-512k", uneven, (1,) * 64),
        Case("verify-b64-4-32k", tuple(32_000 - 11 * i for i in range(64)), (4,) * 64),
        prefill_case(8192),
        prefill_case(8192, 16, 8192),
    ]
    if not quick:
        found += [prefill_case(32768), prefill_case(8192, 1, 24576), prefill_case(4096, 1, 122880)]
    return found


def _calls(works: list[IndexWork], name: str) -> list:
    return [getattr(work, name) for work in works]


def run(case: Case, model: str, fmt: str, bandwidth: float) -> Iterator[IndexRow]:
    """Check and time one case: the whole, the scores, the choice."""
    device, key_format, k = torch.device("cuda"), INDEX_FORMATS[fmt], TOPK[model]
    table = rope(case, device)
    step = make_step(case, device)
    first = make_index_work(step, HEADS, k, key_format, table)
    first.check()
    needed = first.bytes_needed()
    held = first.pool.numel() * first.pool.element_size() + 2 * first.q.numel()
    count = min(num_sets(needed), max(2, _MAX_BYTES // held))
    works = [first] + [make_index_work(step, HEADS, k, key_format, table, first.workspace) for _ in range(count - 1)]
    shape = f"{case.describe()}, k {k}"

    def row(op: str, times: dict, moved: int, torch_us: float | None) -> IndexRow:
        peers = {
            f"{name}_us": times[name].median_us if name in times else None
            for name in ("sglang", "sglang_v2", "flashinfer", "flashinfer_exact", "torch_exact")
        }
        return IndexRow(
            op=op,
            case=f"{case.name}-{model}",
            shape=shape,
            row_format=fmt,
            input_dtype="bfloat16",
            **speed(times["ours"], moved, bandwidth),
            torch_us=torch_us,
            **peers,
        )

    whole = time_graphs({"ours": _calls(works, "fused")})
    yield row("index select", whole, needed, time_eager(first.naive).median_us)
    if not bool((first.visible[first.piece[0] :] > k).any()):
        return  # nothing is scored
    variants = {"ours": _calls(works, "score")}
    peers = [scores_peer(work) for work in works]
    if peers[0] is not None:
        variants["sglang"] = peers
    yield row("index scores", time_graphs(variants), first.bytes_needed(first.piece[0]), None)
    first.score()
    choices = {
        "ours": [first.choose],
        "torch": [first.choose_torch],
        "torch_exact": [first.choose_torch_exact],
        **{name: [call] for name, call in topk_peers(first, first.scores()).items()},
    }
    visible = first.visible[first.piece[0] :]
    moved = 4 * (int((visible * (visible > k)).sum()) + first.piece[1] * k)
    times = time_graphs(choices)
    yield row("index topk", times, moved, times["torch"].median_us)


def rows(bandwidth: float, quick: bool, only: str) -> Iterator[dict]:
    """Every case whose op and name contain ``only``."""
    plans = [("flash", "fp8")] if quick else [("flash", "fp8"), ("flash", "bf16"), ("pro", "fp8")]
    for model, fmt in plans:
        for case in cases(quick):
            if only in f"index {case.name}-{model}":
                for row in run(case, model, fmt, bandwidth):
                    yield asdict(row)
                torch.cuda.empty_cache()
