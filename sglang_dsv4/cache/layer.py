"""One layer of the cache: what is written to it and read from it in a step."""

import torch

from dsv4_kernels.flush import CompressorParams, naive_flush_csa, naive_flush_hca
from dsv4_kernels.index_score import naive_index_query, naive_index_scores, naive_topk_entries
from dsv4_kernels.layout import RowFormat
from dsv4_kernels.row_codec import naive_copy_rows, naive_load_rows
from dsv4_kernels.streams import CSA_PARTS, HCA_PARTS
from dsv4_kernels.window_store import naive_window_store
from sglang_dsv4.cache.checks import check_tensor
from sglang_dsv4.cache.inputs import CompressorInput, WindowInput
from sglang_dsv4.cache.plan import RowCopies, StepPlan
from sglang_dsv4.cache.storage import LayerStorage, StreamStorage
from sglang_dsv4.cache.view import LayerView
from sglang_dsv4.spec import CacheSpec, LayerSpec

_FLOATS = (torch.float32, torch.bfloat16)
# Dot products held at once while scoring; bounds the memory of a long prefill to 256 MiB.
_MAX_SCORED_DOTS = 1 << 26


class LayerCache:
    """Rows, index keys and stream state of one layer."""

    def __init__(
        self,
        spec: CacheSpec,
        layer: LayerSpec,
        storage: LayerStorage,
        cos_sin: torch.Tensor,
        num_window_rows: int,
    ) -> None:
        self.spec = spec
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
            raise ValueError(
                f"layer {layer.layer_id} ({layer.kind}): expected parts {self.parts}, got {part!r}"
            )
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

    def append_window(self, plan: StepPlan, given: WindowInput) -> None:
        """Store the window rows of the new tokens."""
        naive_window_store(
            plan.step,
            given.kv,
            given.norm_weight,
            given.eps,
            self.cos_sin,
            self.storage.pool,
            self.spec.rows,
        )

    def append_compressor(self, plan: StepPlan, part: str, given: CompressorInput) -> None:
        """Take the new tokens into the streams, and store the entries (``"main"``) or index keys that close."""
        params = CompressorParams(
            given.slot_bias, given.norm_weight, given.eps, self.cos_sin, rotate=part == "index"
        )
        storage = self.storage
        if storage.accumulators is not None:
            naive_flush_hca(
                plan.step,
                given.kv_score,
                storage.accumulators,
                storage.pool,
                self.spec.rows,
                params,
            )
            return
        state, pool, fmt = self._overlapping(part)
        naive_flush_csa(plan.step, given.kv_score, state.streams, state.boundary, pool, fmt, params)

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
        self, plan: StepPlan, index_q: torch.Tensor, index_weights: torch.Tensor
    ) -> torch.Tensor:
        """Choose the CSA entries of each new token; see `CompressedKVCache.select`."""
        if self.storage.index_pool is None:
            raise ValueError(
                f"layer {self.layer.layer_id}: expected a CSA layer, got {self.layer.kind!r}"
            )
        num_tokens, heads = index_weights.shape
        name, device = f"layer {self.layer.layer_id} index_q", self.storage.pool.device
        check_tensor(name, index_q, (num_tokens, heads, self.spec.index_dim), _FLOATS, device)
        if num_tokens != plan.num_tokens:
            raise ValueError(f"{name}: expected {plan.num_tokens} tokens, got {num_tokens}")
        ratio, topk = self.layer.ratio, self.spec.index_topk
        visible = plan.num_visible(ratio)
        if num_tokens == 0 or int(visible.max()) <= topk:
            return plan.every_entry_indices(ratio)  # nothing to choose: scoring is skipped
        chosen = torch.full((num_tokens, topk), -1, dtype=torch.int64, device=device)
        for row in range(len(plan.step.seq_lens)):
            tokens = torch.nonzero(plan.step.token_rows == row).flatten()
            if len(tokens):
                self._select_row(plan, row, tokens, index_q, index_weights, chosen)
        return plan.entry_indices(chosen, ratio)

    def _select_row(
        self,
        plan: StepPlan,
        row: int,
        tokens: torch.Tensor,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        chosen: torch.Tensor,
    ) -> None:
        assert self.storage.index_pool is not None, "a CSA layer has index keys"
        step, ratio, topk = plan.step, self.layer.ratio, self.spec.index_topk
        visible = plan.num_visible(ratio)
        entries = torch.arange(int(visible[tokens].max()), device=chosen.device)
        slots = step.index_slots(torch.full_like(entries, row), entries, ratio)
        keys = naive_load_rows(self.storage.index_pool, slots, self.spec.index_keys)
        chunk = max(1, _MAX_SCORED_DOTS // max(1, index_q.shape[1] * len(entries)))
        for part in torch.split(tokens, chunk):
            q = naive_index_query(index_q[part], self.cos_sin[step.positions[part]])
            scores = naive_index_scores(q, index_weights[part], keys)
            best = naive_topk_entries(scores, visible[part], topk)
            chosen[part, : best.shape[1]] = best

    def _overlapping(self, part: str) -> tuple[StreamStorage, torch.Tensor, RowFormat]:
        storage = self.storage
        if part == "index":
            assert storage.index is not None and storage.index_pool is not None, (
                "a CSA layer has an indexer"
            )
            return storage.index, storage.index_pool, self.spec.index_keys
        assert storage.main is not None, "a CSA layer has streams"
        return storage.main, storage.pool, self.spec.rows
