"""The fused kernels of a cache: one launch per layer and part, no host synchronisation, scratch allocated once."""

from collections.abc import Callable
from functools import partial

import torch

from dsv4_kernels.flush_csa import CsaFlush
from dsv4_kernels.flush_csa.fused import flush_csa, flush_csa_layer
from dsv4_kernels.flush_hca.fused import flush_hca, hca_workspace
from dsv4_kernels.index_score.workspace import IndexWorkspace, index_workspace
from dsv4_kernels.index_select.fused import select_entries
from dsv4_kernels.memory import empty
from dsv4_kernels.step import StepTensors
from dsv4_kernels.window_store.fused import window_store
from sglang_dsv4.cache.kernels import LayerMemory, Weights
from sglang_dsv4.cache.long_scores import has_deep_gemm, is_worthwhile, select_long
from sglang_dsv4.cache.plan import StepPlan
from sglang_dsv4.cache.regions import Kind, Part
from sglang_dsv4.cache.storage import Capacity
from sglang_dsv4.spec import CSA_RATIO, CacheSpec

# Tokens of a prefill that are scored together, and scores held at once (64 MiB).
_MAX_SCORED_TOKENS = 2048
_MAX_SCORES = 1 << 24


class TritonKernels:
    """`Kernels` in Triton.

    HCA's main part has a workspace, `select` another; window rows and CSA parts have none. All layers share them, one after the
    other, so a layer's main part must be done before the next layer's begins, and likewise its `select`.
    """

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
        held = [*self._hca, *(self._index or ())]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def writer(self, memory: LayerMemory, part: Part, weights: Weights) -> Callable[[StepTensors, torch.Tensor], None]:
        if part is Part.WINDOW:
            return partial(
                window_store,
                norm_weight=weights.norm_weight,
                eps=weights.eps,
                cos_sin=memory.rope_table,
                pool=memory.storage.pool,
                pool_format=memory.spec.rows,
            )
        params, (pool, fmt) = memory.params(part, weights), memory.target(part)
        if not memory.layer.overlap:
            accumulators = memory.tensor(Kind.ACCUMULATOR, part)
            return partial(flush_hca, accumulators=accumulators, pool=pool, pool_format=fmt, params=params, workspace=self._hca)
        streams, boundary = memory.tensor(Kind.STREAM, part), memory.tensor(Kind.BOUNDARY, part)
        return partial(flush_csa, streams=streams, boundary=boundary, pool=pool, pool_format=fmt, params=params)

    def writer_of_both(
        self, memory: LayerMemory, main: Weights, index: Weights
    ) -> Callable[[StepTensors, torch.Tensor, torch.Tensor], None]:
        bound = [
            partial(
                CsaFlush,
                streams=memory.tensor(Kind.STREAM, part),
                boundary=memory.tensor(Kind.BOUNDARY, part),
                pool=memory.target(part)[0],
                pool_format=memory.target(part)[1],
                params=memory.params(part, weights),
            )
            for part, weights in ((Part.MAIN, main), (Part.INDEX, index))
        ]

        def write_both(step: StepTensors, main_values: torch.Tensor, index_values: torch.Tensor) -> None:
            flush_csa_layer(step, bound[0](main_values), bound[1](index_values))

        return write_both

    def select(
        self,
        memory: LayerMemory,
        plan: StepPlan,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        out: torch.Tensor | None,
        numbering: StepTensors | None,
    ) -> torch.Tensor:
        pad, keys, ratio = out is None, memory.tensor(Kind.INDEX_KEY, Part.INDEX), memory.layer.ratio
        if out is None:
            out = empty((plan.num_tokens, self._spec.index_topk), torch.int32, self._device)
        scratch = self._index_scratch(index_q.shape[1])
        if self._has_deep_gemm and is_worthwhile(plan.step, index_q.shape[1], ratio, out.shape[1]):
            select_long(plan.step, index_q, index_weights, keys, memory.rope_table, ratio, out, scratch, pad, numbering)
        elif plan.num_tokens:
            select_entries(
                plan.step,
                index_q,
                index_weights,
                keys,
                self._spec.index_keys,
                memory.rope_table,
                ratio,
                out,
                scratch,
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
