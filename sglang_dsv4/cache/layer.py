"""One layer of the cache: what is written to it and read from it in a step."""

from collections.abc import Mapping

import torch

from dsv4_kernels.flush import CompressorParams, CsaFlush
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.row_codec import naive_copy_rows
from dsv4_kernels.step import StepTensors
from dsv4_kernels.streams import CSA_PARTS, HCA_PARTS
from sglang_dsv4.cache.checks import check_tensor
from sglang_dsv4.cache.inputs import CompressorInput, WindowInput
from sglang_dsv4.cache.ops import CacheOps
from sglang_dsv4.cache.plan import RowCopies, StepPlan
from sglang_dsv4.cache.storage import LayerStorage, StreamStorage
from sglang_dsv4.cache.view import LayerView
from sglang_dsv4.spec import CacheSpec, LayerSpec

_FLOATS = (torch.float32, torch.bfloat16)


class LayerCache:
    """Rows, index keys and stream state of one layer."""

    def __init__(
        self,
        spec: CacheSpec,
        layer: LayerSpec,
        storage: LayerStorage,
        cos_sin: torch.Tensor,
        num_window_rows: int,
        ops: CacheOps,
    ) -> None:
        self.spec = spec
        self.ops = ops
        self.layer = layer
        self.storage = storage
        self.cos_sin = cos_sin
        self.num_window_rows = num_window_rows
        parts = {"window": (), "csa": ("main", "index"), "hca": ("main",)}[layer.kind]
        self.parts: tuple[str, ...] = ("window", *parts)

    def check(self, plan: StepPlan, part: str, given: WindowInput | CompressorInput) -> None:
        """Raise unless the layer has this part and the input fits it; changes nothing."""
        layer, device = self.layer, self.storage.pool.device
        if part not in self.parts:
            raise ValueError(f"layer {layer.layer_id} ({layer.kind}): expected parts {self.parts}, got {part!r}")
        name = f"layer {layer.layer_id} {part}"
        dim = self.spec.index_dim if part == "index" else self.spec.head_dim
        check_tensor(f"{name} norm_weight", given.norm_weight, (dim,), _FLOATS, device)
        if isinstance(given, WindowInput):
            check_tensor(f"{name} kv", given.kv, (plan.num_tokens, dim), _FLOATS, device)
            return
        width = (CSA_PARTS if layer.overlap else HCA_PARTS) * dim
        slots = 2 * layer.ratio if layer.overlap else layer.ratio
        check_tensor(f"{name} kv_score", given.kv_score, (plan.num_tokens, width), _FLOATS, device)
        check_tensor(f"{name} slot_bias", given.slot_bias, (slots, dim), (torch.float32,), device)

    def copy_shared(self, copies: RowCopies) -> int:
        """Bring over the rows of shared pages that this step writes into; returns how many bytes."""
        storage, rows, ratio = self.storage, self.spec.rows, self.layer.ratio
        naive_copy_rows(storage.pool, *copies.window, rows)
        copied = len(copies.window[0]) * rows.row_bytes
        if ratio:
            sources, targets = copies.history[ratio]
            base = self.num_window_rows
            naive_copy_rows(storage.pool, base + sources, base + targets, rows)
            copied += len(sources) * rows.row_bytes
            if storage.index_pool is not None:
                keys = self.spec.index_keys
                naive_copy_rows(storage.index_pool, sources, targets, keys)
                copied += len(sources) * keys.row_bytes
        sources, targets = copies.boundary
        for state in (storage.main, storage.index):
            if state is not None:
                state.boundary[targets] = state.boundary[sources]
                copied += len(sources) * state.boundary[0].nbytes
        return copied

    def append(self, plan: StepPlan, parts: Mapping[str, WindowInput | CompressorInput]) -> None:
        """Write parts of a step: window rows, and the new tokens' share of the streams with what they close."""
        ops, storage, rows = self.ops, self.storage, self.spec.rows
        window = parts.get("window")
        if isinstance(window, WindowInput):
            ops.store_window(plan, window, self.cos_sin, storage.pool, rows)
        main, index = self._compressor(parts, "main"), self._compressor(parts, "index")
        if storage.accumulators is not None:
            if main is not None:
                ops.flush_hca(plan, main.kv_score, storage.accumulators, storage.pool, rows, self._params("main", main))
        elif main is not None or index is not None:
            ops.flush_csa(plan, self._csa("main", main), self._csa("index", index))

    def view(self, plan: StepPlan) -> LayerView:
        """Rows to attend to; a CSA layer's entries come from `select`."""
        ratio = self.layer.ratio
        listed = ratio > 0 and not self.layer.indexed
        return LayerView(
            pool=self.storage.pool,
            pool_format=self.spec.rows,
            window_indices=plan.window_indices,
            entry_indices=plan.every_entry_indices(ratio) if listed else None,
        )

    def select(
        self,
        plan: StepPlan,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        out: torch.Tensor | None = None,
        numbering: StepTensors | None = None,
    ) -> torch.Tensor:
        """Choose the CSA entries of each new token; see `CompressedKVCache.select`."""
        if self.storage.index_pool is None:
            raise ValueError(f"layer {self.layer.layer_id}: expected a CSA layer, got {self.layer.kind!r}")
        num_tokens, heads = index_weights.shape
        name, device = f"layer {self.layer.layer_id} index_q", self.storage.pool.device
        check_tensor(name, index_q, (num_tokens, heads, self.spec.index_dim), _FLOATS, device)
        if num_tokens != plan.num_tokens:
            raise ValueError(f"{name}: expected {plan.num_tokens} tokens, got {num_tokens}")
        if out is not None and len(out) != num_tokens:
            raise ValueError(f"layer {self.layer.layer_id} out: expected {num_tokens} tokens, got {len(out)}")
        return self.ops.select(
            plan, index_q, index_weights, self.storage.index_pool, self.cos_sin, self.layer.ratio, out, numbering
        )

    @staticmethod
    def _compressor(parts: Mapping[str, WindowInput | CompressorInput], part: str) -> CompressorInput | None:
        given = parts.get(part)
        return given if isinstance(given, CompressorInput) else None

    def _params(self, part: str, given: CompressorInput) -> CompressorParams:
        return CompressorParams(given.slot_bias, given.norm_weight, given.eps, self.cos_sin, rotate=part == "index")

    def _csa(self, part: str, given: CompressorInput | None) -> CsaFlush | None:
        if given is None:
            return None
        state, pool, fmt = self._overlapping(part)
        params = self._params(part, given)
        return CsaFlush(given.kv_score, state.streams, state.boundary, pool, fmt, params)

    def _overlapping(self, part: str) -> tuple[StreamStorage, torch.Tensor, RowFormat]:
        storage = self.storage
        if part == "index":
            assert storage.index is not None and storage.index_pool is not None, "a CSA layer has an indexer"
            return storage.index, storage.index_pool, self.spec.index_keys
        assert storage.main is not None, "a CSA layer has streams"
        return storage.main, storage.pool, self.spec.rows
