"""What fills a layer: the flush of CSA and HCA layers, and the window store, against the references and SGLang's kernels."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dsv4_kernels.compressor import CompressorParams
from dsv4_kernels.flush_csa import CsaFlush, naive_flush_csa
from dsv4_kernels.flush_csa.fused import flush_csa, flush_csa_layer
from dsv4_kernels.flush_hca import naive_flush_hca
from dsv4_kernels.flush_hca.fused import flush_hca, hca_workspace
from dsv4_kernels.layout import HEAD_DIM, INDEX_DIM, INDEX_FORMATS, ROW_FORMATS, RowFormat
from dsv4_kernels.step import StepTensors
from dsv4_kernels.window_store import naive_window_store
from dsv4_kernels.window_store.fused import window_store
from sglang_dsv4.bench import peer_sglang
from sglang_dsv4.bench.cases import EPS, PAGE_TOKENS, Case, flush_cases, make_step, random_rows, rope, window_cases, zero_pool
from sglang_dsv4.bench.job import OURS, Job, Named, expect_bytes, input_sets, load
from sglang_dsv4.bench.timing import Call, count_launches
from sglang_dsv4.spec import CSA_RATIO, HCA_RATIO

PEERS = (peer_sglang.MODULE,)
# A pooled value may be off by about 2^-18 of its row's largest value (the exponentials); an e4m3 or bf16 rounding with 3 or 8
# bits moves for at most 2^-18 * 2^9 = 1 in 512 of such values.
_MAX_DIFFERING = 2.0**-9
# A norm's sum in another order moves a value by 2^-22 of itself; a rounding to e4m3 or bf16 for one value in 2^13.
_MAX_DIFFERING_WINDOW = 2.0**-12


@dataclass
class FlushWork:
    """One layer's tensors for one step. Pools are as small as the step's pages allow.

    Attributes:
        step (StepTensors): the step.
        ratio (int): of the layer.
        parts (dict[str, CsaFlush]): tensors of the main compressor, of the indexer, or of both. An HCA layer's accumulators
            stand where the streams and the boundary states of a CSA layer are.
    """

    step: StepTensors
    ratio: int
    parts: dict[str, CsaFlush]

    def __post_init__(self) -> None:
        step = self.step
        self._workspace = hca_workspace(len(step.seq_lens), len(step.positions), step.seq_lens.device)

    def fused(self) -> None:
        """The layer's one launch."""
        if len(self.parts) == 2:
            flush_csa_layer(self.step, **self.parts)
            return
        (part,) = self.parts.values()
        last = (part.pool, part.pool_format, part.params)
        if self.ratio == HCA_RATIO:
            flush_hca(self.step, part.kv_score, part.streams, *last, self._workspace)
        else:
            flush_csa(self.step, part.kv_score, part.streams, part.boundary, *last)

    def naive(self) -> None:
        """The same by the references."""
        for part in self.parts.values():
            last = (part.pool, part.pool_format, part.params)
            if self.ratio == HCA_RATIO:
                naive_flush_hca(self.step, part.kv_score, part.streams, *last)
            else:
                naive_flush_csa(self.step, part.kv_score, part.streams, part.boundary, *last)

    def outputs(self) -> dict[str, torch.Tensor]:
        """Everything that is written and compared, by name.

        HCA accumulators are sums, not copies, and the one after a block's last token is not kept; entries show them.
        """
        written = ("pool",) if self.ratio == HCA_RATIO else ("pool", "streams", "boundary")
        return {f"{name} {kind}": getattr(part, kind) for name, part in self.parts.items() for kind in written}

    def check(self) -> None:
        """Raise unless the kernel writes what the reference writes: entries up to rounding, states exactly."""
        # A format is itself alone: kernels ask which one it is.
        formats = {id(part.pool_format): part.pool_format for part in self.parts.values()}
        ours, theirs = (deepcopy(self, dict(formats)) for _ in range(2))
        ours.fused()
        theirs.naive()
        allowed = dict.fromkeys(("main pool", "index pool"), _MAX_DIFFERING)
        expect_bytes(ours.outputs(), theirs.outputs(), allowed)

    def bytes_needed(self, case: Case) -> int:
        """Fewest bytes the step can move: every new row read once, every entry and kept state row written once.

        A block that closes here and began earlier also reads the rows that the state holds of it and of the block before it
        (CSA), or its accumulator (HCA); an HCA step always reads and writes the accumulator of a block that stays open.
        """
        total, ratio = 0, self.ratio
        for part in self.parts.values():
            total += part.kv_score.numel() * part.kv_score.element_size() + case.num_closed(ratio) * part.pool_format.row_bytes
            kept = part.streams.shape[1]
            row_bytes = 4 * part.streams[0].numel() // kept
            for start, length in zip(case.starts, case.lengths, strict=True):
                if ratio == HCA_RATIO:
                    total += row_bytes * ((start % ratio > 0) + (length % ratio > 0))
                    continue
                closes = length // ratio > start // ratio
                # Half of each row: the b-stream of the block before, the a-stream of the open one.
                halves = closes * (start % ratio + (ratio if start >= ratio else 0))
                total += min(length - start, kept) * row_bytes + halves * row_bytes // 2
        return total


def make_flush_work(
    case: Case, layer: str, row_format: str, dtype: torch.dtype, step: StepTensors, table: torch.Tensor
) -> FlushWork:
    """Random inputs and states of a layer.

    Args:
        case (Case): the step.
        layer (str): ``"csa"`` (both compressors), ``"csa-main"`` or ``"hca"``.
        row_format (str): of `ROW_FORMATS`; index keys take the matching one.
        dtype (torch.dtype): of the new tokens' rows.
        step (StepTensors): of `make_step`.
        table (torch.Tensor): RoPE table.
    """
    device, is_hca = table.device, layer == "hca"
    ratio = HCA_RATIO if is_hca else CSA_RATIO
    num_pages = step.num_window_rows // PAGE_TOKENS
    formats = {"main": ROW_FORMATS[row_format], "index": INDEX_FORMATS["fp8" if row_format.startswith("fp8") else row_format]}

    def part(dim: int, fmt: RowFormat) -> CsaFlush:
        # The benchmark stores no window rows, but entries of the main compressor lie behind them.
        first = step.num_window_rows if dim == HEAD_DIM else 0
        params = CompressorParams(
            slot_bias=torch.randn(ratio if is_hca else 2 * ratio, dim, device=device),
            norm_weight=1 + 0.1 * torch.randn(dim, device=device),
            eps=EPS,
            cos_sin=table,
            rotate=dim == INDEX_DIM,
        )
        kv_score = random_rows((case.num_tokens, (2 if is_hca else 4) * dim), dtype, device)
        if is_hca:
            streams = boundary = random_rows((len(case.starts), 1, 3, dim), torch.float32, device).abs() + 0.5
        else:
            streams = random_rows((len(case.starts), 2 * ratio, 4 * dim), torch.float32, device)
            boundary = random_rows((num_pages, ratio, 2, dim), torch.float32, device)
        return CsaFlush(kv_score, streams, boundary, zero_pool(fmt, first + step.num_window_rows // ratio, device), fmt, params)

    names = ("main", "index") if layer == "csa" else ("main",)
    return FlushWork(step, ratio, {n: part(HEAD_DIM if n == "main" else INDEX_DIM, formats[n]) for n in names})


def flush(layer: str, case: Case, row_format: str, dtype: torch.dtype, device: torch.device) -> Iterator[Job]:
    """The flush of a layer. SGLang's kernels take part where they take such inputs and rows."""
    step, table = make_step(case, device), rope(case, device)
    make = partial(make_flush_work, case, layer, row_format, dtype, step, table)
    first = make()
    moved = first.bytes_needed(case)
    held = moved + sum(tensor.nbytes for tensor in first.outputs().values())
    works = [first, *input_sets(make, moved, held)[1:]]
    calls: dict[str, list[Call]] = {OURS: [work.fused for work in works], "warm": [first.fused]}
    module, _ = load(peer_sglang.MODULE)
    peers = []
    if module is not None and dtype == torch.float32 and row_format == "fp8_584":
        peers = [peer_sglang.compressors(module, case, work) for work in works]
        calls["sglang"] = [partial(peer_sglang.run, peer) for peer in peers]
        calls["sglang_warm"] = calls["sglang"][:1]

    def check() -> dict[str, Any]:
        first.check()
        facts: dict[str, Any] = {"launches": count_launches(first.fused)}
        if peers:
            facts["sglang_launches"] = count_launches(calls["sglang"][0])
        if peers and not any(case.starts) and layer != "hca":
            theirs = peers[0][0].pool.flatten()
            mine = first.parts["main"].pool.flatten()[-theirs.numel() :]
            facts["sglang_same_bytes"] = (mine == theirs).float().mean().item()
        return facts

    dtype_name = str(dtype).removeprefix("torch.")
    yield Job(f"flush {layer}", case.name, case.shape, row_format, dtype_name, moved, check, calls, {"torch": first.naive})


def window(case: Case, row_format: str, device: torch.device) -> Iterator[Job]:
    """The window store."""
    fmt, table, step = ROW_FORMATS[row_format], rope(case, device), make_step(case, device)
    weight = 1 + 0.1 * torch.randn(HEAD_DIM, device=device)
    moved = case.num_tokens * (2 * HEAD_DIM + fmt.row_bytes)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        kv = random_rows((case.num_tokens, HEAD_DIM), torch.bfloat16, device)
        return kv, zero_pool(fmt, step.num_window_rows, device)

    def call(kv: torch.Tensor, pool: torch.Tensor) -> None:
        window_store(step, kv, weight, EPS, table, pool, fmt)

    works = input_sets(make, moved, 1)
    kv, pool = works[0]
    expected = pool.clone()

    def naive() -> None:
        naive_window_store(step, kv, weight, EPS, table, expected, fmt)

    def check() -> dict[str, Any]:
        call(kv, pool)
        naive()
        expect_bytes({"pool": pool}, {"pool": expected}, {"pool": _MAX_DIFFERING_WINDOW})
        return {}

    calls = {OURS: [partial(call, *work) for work in works], "warm": [partial(call, kv, pool)]}
    yield Job("window store", case.name, case.shape, row_format, "bfloat16", moved, check, calls, {"torch": naive})


def jobs(quick: bool, device: torch.device) -> Iterator[Named]:
    """All flushes, some with bf16 rows and with bf16 inputs, too, and window stores.

    A compressor has the same shape in Flash and in Pro: these rows are for both.
    """
    for layer, ratio in (("csa", CSA_RATIO), ("csa-main", CSA_RATIO), ("hca", HCA_RATIO)):
        for case in flush_cases(ratio, quick):
            kinds = [("fp8_584", torch.float32)]
            if case.name in ("decode-b256-mixed", "prefill-1x8192") and layer != "csa-main":
                kinds += [("bf16", torch.float32), ("fp8_584", torch.bfloat16)]
            for row_format, dtype in kinds:
                yield f"flush {layer} {case.name}", partial(flush, layer, case, row_format, dtype, device)
    for case in window_cases(quick):
        for row_format in ("fp8_584",) if quick else ("fp8_584", "bf16"):
            yield f"window store {case.name}", partial(window, case, row_format, device)
