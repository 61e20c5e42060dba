"""The references as kernels of a cache: they run anywhere, and ask the device for sizes as they go."""

from collections.abc import Callable
from functools import partial

import torch

from dsv4_kernels.compressor import CompressorParams
from dsv4_kernels.flush_csa import naive_flush_csa
from dsv4_kernels.flush_hca import naive_flush_hca
from dsv4_kernels.index_query import naive_index_query
from dsv4_kernels.index_score import naive_index_scores
from dsv4_kernels.index_topk import naive_topk_entries
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.row_codec import naive_load_rows
from dsv4_kernels.step import StepTensors
from dsv4_kernels.window_store import naive_window_store
from sglang_dsv4.cache.kernels import LayerMemory, Weights
from sglang_dsv4.cache.plan import StepPlan
from sglang_dsv4.cache.regions import Kind, Part
from sglang_dsv4.cache.step_rows import StepRows, unpadded

# Dot products held at once while scoring; bounds the memory of a long prefill to 256 MiB.
_MAX_SCORED_DOTS = 1 << 26


class TorchKernels:
    """`Kernels` in PyTorch."""

    name = "torch"
    index_scores = "torch"
    nbytes = 0

    def writer(self, memory: LayerMemory, part: Part, weights: Weights) -> Callable[[StepTensors, torch.Tensor], None]:
        if part is Part.WINDOW:
            return partial(
                _write_window, weights.norm_weight, weights.eps, memory.rope_table, memory.storage.pool, memory.spec.rows
            )
        params, (pool, fmt) = memory.params(part, weights), memory.target(part)
        if memory.layer.overlap:
            return partial(_write_csa, memory.tensor(Kind.STREAM, part), memory.tensor(Kind.BOUNDARY, part), pool, fmt, params)
        return partial(_write_hca, memory.tensor(Kind.ACCUMULATOR, part), pool, fmt, params)

    def writer_of_both(self, memory: LayerMemory, main: Weights, index: Weights) -> None:
        return None

    def select(
        self,
        memory: LayerMemory,
        plan: StepPlan,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        out: torch.Tensor | None,
        numbering: StepTensors | None,
    ) -> torch.Tensor:
        ratio = memory.layer.ratio
        listing = plan.rows if numbering is None else StepRows(numbering, memory.spec.window)
        if plan.num_tokens == 0 or int(plan.rows.num_visible(ratio).max()) <= memory.spec.index_topk:
            rows = listing.every_entry(ratio)  # nothing to choose: scoring is skipped
        else:
            with torch.no_grad():
                rows = listing.entries(_choose(memory, plan.rows, index_q, index_weights), ratio)
        if out is None:
            return rows
        width = min(rows.shape[1], out.shape[1])
        chosen, place = rows[:, :width], out[:, :width]
        place.copy_(torch.where(chosen >= 0, chosen.to(out.dtype), place))
        return out


@torch.no_grad()
def _write_window(
    norm_weight: torch.Tensor,
    eps: float,
    rope_table: torch.Tensor,
    pool: torch.Tensor,
    fmt: RowFormat,
    step: StepTensors,
    values: torch.Tensor,
) -> None:
    step, values = unpadded(step, values)
    naive_window_store(step, values, norm_weight, eps, rope_table, pool, fmt)


@torch.no_grad()
def _write_csa(
    streams: torch.Tensor,
    boundary: torch.Tensor,
    pool: torch.Tensor,
    fmt: RowFormat,
    params: CompressorParams,
    step: StepTensors,
    values: torch.Tensor,
) -> None:
    step, values = unpadded(step, values)
    naive_flush_csa(step, values, streams, boundary, pool, fmt, params)


@torch.no_grad()
def _write_hca(
    accumulators: torch.Tensor,
    pool: torch.Tensor,
    fmt: RowFormat,
    params: CompressorParams,
    step: StepTensors,
    values: torch.Tensor,
) -> None:
    step, values = unpadded(step, values)
    naive_flush_hca(step, values, accumulators, pool, fmt, params)


def _choose(memory: LayerMemory, rows: StepRows, index_q: torch.Tensor, index_weights: torch.Tensor) -> torch.Tensor:
    """Entry numbers of the best scores of each token: ``[T, K]`` int64, -1 at the end."""
    spec, ratio, step = memory.spec, memory.layer.ratio, rows.step
    keys_pool, device = memory.tensor(Kind.INDEX_KEY, Part.INDEX), index_q.device
    visible = rows.num_visible(ratio)
    chosen = torch.full((len(step.positions), spec.index_topk), -1, dtype=torch.int64, device=device)
    for row in range(len(step.seq_lens)):
        tokens = torch.nonzero(step.token_rows == row).flatten()
        if not len(tokens):
            continue
        entries = torch.arange(int(visible[tokens].max()), device=device)
        slots = step.index_slots(torch.full_like(entries, row), entries, ratio)
        keys = naive_load_rows(keys_pool, slots, spec.index_keys)
        chunk = max(1, _MAX_SCORED_DOTS // max(1, index_q.shape[1] * len(entries)))
        for part in torch.split(tokens, chunk):
            q = naive_index_query(index_q[part], memory.rope_table[step.positions[part]], spec.index_keys)
            best = naive_topk_entries(naive_index_scores(q, index_weights[part], keys), visible[part], spec.index_topk)
            chosen[part, : best.shape[1]] = best
    return chosen
