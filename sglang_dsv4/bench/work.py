"""Tensors of a layer for one step, several times over, and the calls that are timed."""

from dataclasses import dataclass

import torch

from dsv4_kernels.flush import CompressorParams
from dsv4_kernels.flush.naive import naive_flush_csa, naive_flush_hca
from dsv4_kernels.flush_csa import CsaFlush, flush_csa, flush_csa_layer
from dsv4_kernels.flush_hca import flush_hca, hca_workspace
from dsv4_kernels.layout import HEAD_DIM, INDEX_DIM, INDEX_FORMATS, ROPE_DIM, ROW_FORMATS, RowFormat
from dsv4_kernels.norm_rope import RopeSpec, rope_table
from dsv4_kernels.step import StepTensors
from sglang_dsv4.bench.cases import PAGE_TOKENS, Case
from sglang_dsv4.spec import CSA_RATIO, HCA_RATIO

EPS = 1e-6


def make_step(case: Case, device: torch.device) -> StepTensors:
    """The step's tensors: every request has its own pages, in no order."""
    pages = -(-max(case.lengths) // PAGE_TOKENS)
    count = case.num_requests
    table = torch.randperm(count * pages, device=device).view(count, pages)
    extends = torch.tensor(case.extends, device=device)
    starts = torch.tensor(case.starts, device=device)
    rows = torch.repeat_interleave(torch.arange(count, device=device), extends)
    first = torch.cumsum(extends, 0) - extends
    positions = torch.arange(case.num_tokens, device=device) - first[rows] + starts[rows]
    return StepTensors(
        positions=positions,
        token_rows=rows,
        seq_lens=starts + extends,
        extend_lens=extends,
        state_slots=torch.randperm(count, device=device),
        history_pages=table,
        window_pages=table.clone(),
        page_tokens=PAGE_TOKENS,
        num_window_rows=count * pages * PAGE_TOKENS,
    )


def make_params(ratio: int, dim: int, table: torch.Tensor) -> CompressorParams:
    """Random weights of one compressor."""
    slots = 2 * ratio if ratio == CSA_RATIO else ratio
    device = table.device
    return CompressorParams(
        slot_bias=torch.randn(slots, dim, device=device),
        norm_weight=1 + 0.1 * torch.randn(dim, device=device),
        eps=EPS,
        cos_sin=table,
        rotate=dim == INDEX_DIM,
    )


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal values."""
    return torch.randn(shape, device=device).to(dtype)


@dataclass
class FlushWork:
    """One layer's tensors for one step. Pools are as small as the step's pages allow."""

    step: StepTensors
    main: CsaFlush
    index: CsaFlush | None

    def __post_init__(self) -> None:
        device = self.step.seq_lens.device
        self.workspace = hca_workspace(len(self.step.seq_lens), len(self.step.positions), device)

    def fused(self) -> None:
        """The layer's one launch."""
        if self.index is not None:
            flush_csa_layer(self.step, self.main, self.index)
            return
        part = self.main
        if part.boundary is part.streams:
            flush_hca(self.step, part.kv_score, part.streams, part.pool, part.pool_format, part.params, self.workspace)
        else:
            flush_csa(self.step, part.kv_score, part.streams, part.boundary, part.pool, part.pool_format, part.params)

    def naive(self) -> None:
        """The same by the references."""
        for part in (self.main, self.index):
            if part is None:
                continue
            if part.boundary is part.streams:
                naive_flush_hca(self.step, part.kv_score, part.streams, part.pool, part.pool_format, part.params)
            else:
                naive_flush_csa(self.step, part.kv_score, part.streams, part.boundary, part.pool, part.pool_format, part.params)

    def copy(self) -> "FlushWork":
        """The same work on copies of all that is written."""
        return FlushWork(self.step, _copy(self.main), None if self.index is None else _copy(self.index))

    def outputs(self) -> dict[str, torch.Tensor]:
        """Everything that is written, by name."""
        found = {}
        for name, part in (("main", self.main), ("index", self.index)):
            if part is not None:
                found |= {f"{name} pool": part.pool, f"{name} state": part.streams, f"{name} boundary": part.boundary}
        return found


def _copy(part: CsaFlush) -> CsaFlush:
    streams = part.streams.clone()
    boundary = streams if part.boundary is part.streams else part.boundary.clone()
    return CsaFlush(part.kv_score, streams, boundary, part.pool.clone(), part.pool_format, part.params)


def zero_pool(fmt: RowFormat, num_rows: int, device: torch.device) -> torch.Tensor:
    """A pool that holds no rows yet."""
    return torch.zeros(fmt.pool_shape(num_rows), dtype=fmt.storage_dtype, device=device)


def make_flush_work(
    case: Case, layer: str, row_format: str, dtype: torch.dtype, step: StepTensors, table: torch.Tensor
) -> FlushWork:
    """Random inputs and states of a layer.

    Args:
        case (Case): the step.
        layer (str): ``"csa"`` (both compressors), ``"csa-main"``, ``"csa-index"`` or ``"hca"``.
        row_format (str): of `ROW_FORMATS`; index keys take the matching one.
        dtype (torch.dtype): of the new tokens' rows.
        step (StepTensors): of `make_step`.
        table (torch.Tensor): RoPE table.
    """
    rows, keys = (ROW_FORMATS[row_format], INDEX_FORMATS["fp8" if row_format.startswith("fp8") else row_format])
    device = table.device
    num_pages = step.num_window_rows // PAGE_TOKENS

    def csa(dim: int, fmt: RowFormat) -> CsaFlush:
        # The benchmark stores no window rows, but entries lie behind them.
        first = step.num_window_rows if dim == HEAD_DIM else 0
        return CsaFlush(
            kv_score=random_rows((case.num_tokens, 4 * dim), dtype, device),
            streams=random_rows((case.num_requests, 2 * CSA_RATIO, 4 * dim), torch.float32, device),
            boundary=random_rows((num_pages, CSA_RATIO, 2, dim), torch.float32, device),
            pool=zero_pool(fmt, first + num_pages * (PAGE_TOKENS // CSA_RATIO), device),
            pool_format=fmt,
            params=make_params(CSA_RATIO, dim, table),
        )

    if layer == "hca":
        state = random_rows((case.num_requests, 1, 3, HEAD_DIM), torch.float32, device).abs() + 0.5
        first = step.num_window_rows
        part = CsaFlush(
            kv_score=random_rows((case.num_tokens, 2 * HEAD_DIM), dtype, device),
            streams=state,
            boundary=state,
            pool=zero_pool(rows, first + num_pages * (PAGE_TOKENS // HCA_RATIO), device),
            pool_format=rows,
            params=make_params(HCA_RATIO, HEAD_DIM, table),
        )
        return FlushWork(step, part, None)
    if layer == "csa-main":
        return FlushWork(step, csa(HEAD_DIM, rows), None)
    if layer == "csa-index":
        return FlushWork(step, csa(INDEX_DIM, keys), None)
    return FlushWork(step, csa(HEAD_DIM, rows), csa(INDEX_DIM, keys))


def bytes_needed(case: Case, work: FlushWork) -> int:
    """Fewest bytes the step can move: every new row read once, every entry and kept state row written once.

    A block that closes here and began earlier also reads the rows that the state holds of it and of the block before it
    (CSA), or its accumulator (HCA); an HCA step always reads and writes the accumulator of a block that stays open.
    """
    total = 0
    for part in (work.main, work.index):
        if part is None:
            continue
        is_hca = part.boundary is part.streams
        ratio = HCA_RATIO if is_hca else CSA_RATIO
        total += part.kv_score.numel() * part.kv_score.element_size()
        total += case.num_closed(ratio) * part.pool_format.row_bytes
        row_bytes = 4 * part.streams[0].numel() // part.streams.shape[1]
        for start, count in zip(case.starts, case.extends, strict=True):
            if is_hca:
                total += row_bytes * ((start % ratio > 0) + ((start + count) % ratio > 0))
                continue
            total += min(count, part.streams.shape[1]) * row_bytes
            closes = (start + count) // ratio > start // ratio
            # Half of each row: the b-stream of the block before, the a-stream of the open one.
            total += closes * (start % ratio + (ratio if start >= ratio else 0)) * row_bytes // 2
    return total


def rope(case: Case, device: torch.device) -> torch.Tensor:
    """The table of a compressing layer, fp32, with a row for each position of the case and one more."""
    spec = RopeSpec(160000.0, ROPE_DIM, 16.0, 65536)
    return rope_table(spec, max(case.lengths) + 1, device)
