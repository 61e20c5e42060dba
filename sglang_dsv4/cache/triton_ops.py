"""The fused operations: one launch per layer and kind, no host synchronisation, scratch allocated once."""

import torch

from dsv4_kernels.flush import CompressorParams, CsaFlush
from dsv4_kernels.flush_csa import flush_csa, flush_csa_layer
from dsv4_kernels.flush_hca import flush_hca, hca_workspace
from dsv4_kernels.index_score.fused import select_entries
from dsv4_kernels.index_score.workspace import IndexWorkspace, index_workspace
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.memory import empty
from dsv4_kernels.step import StepTensors
from dsv4_kernels.window_store.fused import window_store
from sglang_dsv4.cache.inputs import WindowInput
from sglang_dsv4.cache.long_scores import has_deep_gemm, select_long, takes
from sglang_dsv4.cache.plan import StepPlan
from sglang_dsv4.cache.storage import Capacity
from sglang_dsv4.spec import CSA_RATIO, CacheSpec

# Tokens of a prefill that are scored together, and scores held at once (64 MiB).
_MAX_SCORED_TOKENS = 2048
_MAX_SCORES = 1 << 24


class TritonOps:
    """`CacheOps` by Triton kernels; one stream at a time may use them, since they share their scratch."""

    name = "triton"

    def __init__(self, spec: CacheSpec, capacity: Capacity, device: torch.device, index_heads: int | None = None) -> None:
        self._spec = spec
        self._device = device
        # No step has more new tokens than the window pages hold.
        self._max_tokens = capacity.window_pages * spec.page_tokens
        self._max_entries = capacity.history_pages * spec.page_tokens // CSA_RATIO
        self._hca = hca_workspace(capacity.state_slots, self._max_tokens, device)
        self._index: IndexWorkspace | None = None
        self._has_deep_gemm = has_deep_gemm(device, spec.index_keys)
        if index_heads is not None and any(layer.indexed for layer in spec.layers):
            self._index_scratch(index_heads)

    @property
    def index_scores(self) -> str:
        """Whose kernels score index keys."""
        return "triton, long prefills by DeepGEMM" if self._has_deep_gemm else "triton"

    @property
    def nbytes(self) -> int:
        held = list(self._hca)
        if self._index is not None:
            held += list(self._index)
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def store_window(
        self, plan: StepPlan, given: WindowInput, cos_sin: torch.Tensor, pool: torch.Tensor, fmt: RowFormat
    ) -> None:
        window_store(plan.step, given.kv, given.norm_weight, given.eps, cos_sin, pool, fmt)

    def flush_csa(self, plan: StepPlan, main: CsaFlush | None, index: CsaFlush | None) -> None:
        if main is not None and index is not None:
            flush_csa_layer(plan.step, main, index)
            return
        for part in (main, index):
            if part is not None:
                flush_csa(plan.step, part.kv_score, part.streams, part.boundary, part.pool, part.pool_format, part.params)

    def flush_hca(
        self,
        plan: StepPlan,
        kv_score: torch.Tensor,
        accumulators: torch.Tensor,
        pool: torch.Tensor,
        fmt: RowFormat,
        params: CompressorParams,
    ) -> None:
        flush_hca(plan.step, kv_score, accumulators, pool, fmt, params, self._hca)

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
        pad = out is None
        if out is None:
            out = empty((plan.num_tokens, self._spec.index_topk), torch.int32, self._device)
        heads = index_q.shape[1]
        if self._has_deep_gemm and takes(plan.step, heads, ratio, out.shape[1]):
            select_long(
                plan.step, index_q, index_weights, index_pool, cos_sin, ratio, out, self._index_scratch(heads), pad, numbering
            )
        elif plan.num_tokens:
            select_entries(
                plan.step,
                index_q,
                index_weights,
                index_pool,
                self._spec.index_keys,
                cos_sin,
                ratio,
                out,
                self._index_scratch(heads),
                pad=pad,
                numbering=numbering,
            )
        return out

    def _index_scratch(self, heads: int) -> IndexWorkspace:
        """Made by the first call where nobody said how many index heads the model has."""
        if self._index is None:
            tokens = min(self._max_tokens, _MAX_SCORED_TOKENS)
            scores = max(self._max_entries, min(_MAX_SCORES, tokens * self._max_entries))
            self._index = index_workspace(tokens, scores, heads, self._spec.index_topk, self._spec.index_keys, self._device)
        return self._index
