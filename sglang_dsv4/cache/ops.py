"""The operations that fill a cache and choose its entries, as one interface: PyTorch anywhere, Triton on a GPU."""

from dataclasses import replace
from typing import Protocol

import torch

from dsv4_kernels.flush import CompressorParams, CsaFlush, naive_flush_csa, naive_flush_hca
from dsv4_kernels.index_score import naive_index_query, naive_index_scores, naive_topk_entries
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.row_codec import naive_load_rows
from dsv4_kernels.step import StepTensors
from dsv4_kernels.window_store import naive_window_store
from sglang_dsv4.cache.inputs import WindowInput
from sglang_dsv4.cache.plan import StepPlan
from sglang_dsv4.cache.storage import Capacity
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.spec import CacheSpec

KERNELS = ("auto", "torch", "triton")
# Dot products held at once while scoring; bounds the memory of a long prefill to 256 MiB.
_MAX_SCORED_DOTS = 1 << 26


class CacheOps(Protocol):
    """What a layer calls to write its share of a step, and to choose entries."""

    name: str

    @property
    def index_scores(self) -> str:
        """Whose kernels score index keys."""

    @property
    def nbytes(self) -> int:
        """Bytes of scratch that the operations hold."""

    def store_window(
        self, plan: StepPlan, given: WindowInput, cos_sin: torch.Tensor, pool: torch.Tensor, fmt: RowFormat
    ) -> None:
        """Norm, rotate and store the window rows of the new tokens."""

    def flush_csa(self, plan: StepPlan, main: CsaFlush | None, index: CsaFlush | None) -> None:
        """Take the new tokens into a CSA layer's streams, and store what closes; one compressor or both."""

    def flush_hca(
        self,
        plan: StepPlan,
        kv_score: torch.Tensor,
        accumulators: torch.Tensor,
        pool: torch.Tensor,
        fmt: RowFormat,
        params: CompressorParams,
    ) -> None:
        """Take the new tokens into an HCA layer's accumulators, and store the entries that close."""

    def select(
        self,
        plan: StepPlan,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        index_pool: torch.Tensor,
        cos_sin: torch.Tensor,
        ratio: int,
        out: torch.Tensor | None = None,
        numbering: StepTensors | None = None,
    ) -> torch.Tensor:
        """Pool rows of the entries that each new token attends to; see `CompressedKVCache.select`."""


def make_ops(name: str, spec: CacheSpec, capacity: Capacity, device: torch.device, index_heads: int | None = None) -> CacheOps:
    """The operations of a cache.

    Args:
        name (str): of `KERNELS`; ``"auto"`` takes Triton on a CUDA device and PyTorch elsewhere.
        spec (CacheSpec): the cache's.
        capacity (Capacity): bounds the scratch.
        device (torch.device): where the cache lives.
        index_heads (int | None): of the indexer, where they are known beforehand.

    Raises:
        ValueError: an unknown name.
        UnsupportedError: Triton was asked for where it cannot run.
    """
    if name not in KERNELS:
        raise ValueError(f"kernels: expected one of {KERNELS}, got {name!r}")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return TorchOps(spec)
    from dsv4_kernels.device import is_interpreting
    from sglang_dsv4.cache.triton_ops import TritonOps

    if device.type != "cuda" and not is_interpreting():
        raise UnsupportedError(f"kernels triton: expected a CUDA device, got {device}")
    return TritonOps(spec, capacity, device, index_heads)


class TorchOps:
    """The references; they run anywhere, and ask the device for sizes as they go."""

    name = "torch"
    index_scores = "torch"
    nbytes = 0

    def __init__(self, spec: CacheSpec) -> None:
        self._spec = spec

    def store_window(
        self, plan: StepPlan, given: WindowInput, cos_sin: torch.Tensor, pool: torch.Tensor, fmt: RowFormat
    ) -> None:
        step, kv = plan.unpadded(given.kv)
        naive_window_store(step, kv, given.norm_weight, given.eps, cos_sin, pool, fmt)

    def flush_csa(self, plan: StepPlan, main: CsaFlush | None, index: CsaFlush | None) -> None:
        for part in (main, index):
            if part is not None:
                step, kv_score = plan.unpadded(part.kv_score)
                naive_flush_csa(step, kv_score, part.streams, part.boundary, part.pool, part.pool_format, part.params)

    def flush_hca(
        self,
        plan: StepPlan,
        kv_score: torch.Tensor,
        accumulators: torch.Tensor,
        pool: torch.Tensor,
        fmt: RowFormat,
        params: CompressorParams,
    ) -> None:
        step, kv_score = plan.unpadded(kv_score)
        naive_flush_hca(step, kv_score, accumulators, pool, fmt, params)

    def select(
        self,
        plan: StepPlan,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        index_pool: torch.Tensor,
        cos_sin: torch.Tensor,
        ratio: int,
        out: torch.Tensor | None = None,
        numbering: StepTensors | None = None,
    ) -> torch.Tensor:
        listing = plan if numbering is None else replace(plan, step=numbering)
        rows = self._select(plan, listing, index_q, index_weights, index_pool, cos_sin, ratio)
        if out is None:
            return rows
        width = min(rows.shape[1], out.shape[1])
        chosen, place = rows[:, :width], out[:, :width]
        place.copy_(torch.where(chosen >= 0, chosen.to(out.dtype), place))
        return out

    def _select(
        self,
        plan: StepPlan,
        listing: StepPlan,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        index_pool: torch.Tensor,
        cos_sin: torch.Tensor,
        ratio: int,
    ) -> torch.Tensor:
        topk = self._spec.index_topk
        if plan.num_tokens == 0 or int(plan.num_visible(ratio).max()) <= topk:
            return listing.every_entry_indices(ratio)  # nothing to choose: scoring is skipped
        chosen = torch.full((plan.num_tokens, topk), -1, dtype=torch.int64, device=index_pool.device)
        for row in range(len(plan.step.seq_lens)):
            tokens = torch.nonzero(plan.step.token_rows == row).flatten()
            if len(tokens):
                self._select_row(plan, row, tokens, index_q, index_weights, index_pool, cos_sin, ratio, chosen)
        return listing.entry_indices(chosen, ratio)

    def _select_row(
        self,
        plan: StepPlan,
        row: int,
        tokens: torch.Tensor,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        index_pool: torch.Tensor,
        cos_sin: torch.Tensor,
        ratio: int,
        chosen: torch.Tensor,
    ) -> None:
        step, keys_format = plan.step, self._spec.index_keys
        visible = plan.num_visible(ratio)
        entries = torch.arange(int(visible[tokens].max()), device=chosen.device)
        slots = step.index_slots(torch.full_like(entries, row), entries, ratio)
        keys = naive_load_rows(index_pool, slots, keys_format)
        chunk = max(1, _MAX_SCORED_DOTS // max(1, index_q.shape[1] * len(entries)))
        for part in torch.split(tokens, chunk):
            rows = cos_sin[step.positions[part]]
            q = naive_index_query(index_q[part], rows, keys_format)
            scores = naive_index_scores(q, index_weights[part], keys)
            best = naive_topk_entries(scores, visible[part], self._spec.index_topk)
            chosen[part, : best.shape[1]] = best
