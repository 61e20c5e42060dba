"""The attention backend that SGLang knows as ``dsv4``."""

from collections import Counter
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_dsv4.attention import Attention
from sglang_dsv4.cache import CompressorInput, PageTables, StepPlan
from sglang_dsv4.errors import StalePlanError
from sglang_dsv4.plugin.checks import ServingChecks
from sglang_dsv4.plugin.pool import CompressedTokenToKVPool


class CompressedKVBackend(AttentionBackend):
    """Fills `CompressedKVCache` and attends over it, under SGLang's own DeepSeek-V4 model.

    A step's plan is made from `ForwardBatch` alone. A request starts at a page boundary, after a prefix hit or at 0, and
    the cache needs nothing but the page tables to continue there: there is no state to restore or to clear.

    Attributes:
        steps (Counter[str]): how many steps of each of SGLang's forward modes have run.
    """

    needs_cpu_seq_lens = True

    def __init__(
        self,
        pool: CompressedTokenToKVPool,
        req_to_token: torch.Tensor,
        attention: Attention,
        checks: ServingChecks | None = None,
    ) -> None:
        super().__init__()
        self.token_to_kv_pool = pool
        self.cache = pool.cache
        self.attention = attention
        self.checks = checks
        self._req_to_token = req_to_token
        self._selected: dict[int, torch.Tensor] = {}
        self.steps: Counter[str] = Counter()

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan the step."""
        self._selected.clear()
        self.steps[forward_batch.forward_mode.name.lower()] += 1
        if forward_batch.forward_mode.is_idle():
            self.token_to_kv_pool.plan = None
            return
        plan = self._plan(forward_batch)
        if self.checks is not None:
            self.checks.before(plan, forward_batch.rids)
        self.token_to_kv_pool.plan = plan
        self.attention.plan(plan)

    def get_swa_out_cache_loc(self, forward_batch: Any) -> torch.Tensor:
        """Window slots of the new tokens in SGLang's numbering; the pool takes them from the plan instead."""
        return self.token_to_kv_pool.translate_loc_from_full_to_swa(forward_batch.out_cache_loc)

    def forward_core_compressor(
        self, x: torch.Tensor, forward_batch: Any, layer_id: int, compressor: Any
    ) -> None:
        """Take the new tokens into a layer's main compressor.

        Args:
            x (torch.Tensor): ``[T, hidden]``, the layer's normed input.
            forward_batch (Any): SGLang's ForwardBatch.
            layer_id (int): the layer.
            compressor (Any): SGLang's Compressor, whose weights are used.
        """
        if not forward_batch.forward_mode.is_idle():
            given = self._compressor_input(x, forward_batch, compressor)
            self.cache.append(layer_id, self.token_to_kv_pool.current_plan(), main=given)

    def forward_indexer_compressor(
        self, x: torch.Tensor, forward_batch: Any, layer_id: int, compressor: Any
    ) -> None:
        """Take the new tokens into a CSA layer's indexer compressor; arguments as in `forward_core_compressor`."""
        if not forward_batch.forward_mode.is_idle():
            given = self._compressor_input(x, forward_batch, compressor)
            self.cache.append(layer_id, self.token_to_kv_pool.current_plan(), index=given)

    def forward_c4_indexer(
        self,
        x: torch.Tensor,
        q_lora: torch.Tensor,
        c4_indexer: Any,
        forward_batch: Any,
        skip_compressor: bool = False,
        **_: Any,
    ) -> None:
        """Append a CSA layer's index keys, and choose the entries that its queries attend to.

        Args:
            x (torch.Tensor): ``[T, hidden]``, the layer's normed input.
            q_lora (torch.Tensor): ``[T, q_lora_rank]``, the normed query latent.
            c4_indexer (Any): SGLang's C4Indexer, whose weights are used.
            forward_batch (Any): SGLang's ForwardBatch.
            skip_compressor (bool): the index keys were appended already.
        """
        if forward_batch.forward_mode.is_idle():
            return
        layer_id = c4_indexer.layer_id
        if not skip_compressor:
            self.forward_indexer_compressor(x, forward_batch, layer_id, c4_indexer.compressor)
        index_q = c4_indexer.wq_b(q_lora)[0].view(-1, c4_indexer.n_heads, c4_indexer.head_dim)
        weights = c4_indexer.compute_weights(x)
        plan = self.token_to_kv_pool.current_plan()
        self._selected[layer_id] = self.cache.select(layer_id, plan, index_q, weights)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        attn_sink: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """Attend one layer's queries.

        Args:
            q (torch.Tensor): ``[T, H, 512]``, normed and rotated.
            k (torch.Tensor): unused; the model stored its rows before this call.
            v (torch.Tensor): unused.
            layer (Any): SGLang's RadixAttention, for its layer number.
            forward_batch (Any): SGLang's ForwardBatch.
            save_kv_cache (bool): must be False.
            attn_sink (torch.Tensor): ``[H]``, sink logits.

        Returns:
            torch.Tensor: ``[T, H, 512]`` in ``q.dtype``.
        """
        del k, v
        if forward_batch.forward_mode.is_idle():
            return q.new_empty(q.shape)
        if save_kv_cache:
            raise StalePlanError(
                f"layer {layer.layer_id}: expected rows stored before attention, got save_kv_cache=True"
            )
        out = self.attention.run(
            layer.layer_id, q, attn_sink, self._selected.pop(layer.layer_id, None)
        )
        if self.checks is not None and layer.layer_id == len(self.cache.layers) - 1:
            self.checks.after(self.token_to_kv_pool.current_plan(), forward_batch.rids)
        return out

    def _compressor_input(
        self, x: torch.Tensor, forward_batch: Any, compressor: Any
    ) -> CompressorInput:
        # SGLang re-lays ``ape`` at load as [slots, D]: first the previous block's rows, then the own block's.
        return CompressorInput(
            kv_score=compressor.compute_kv_score(x, forward_batch),
            slot_bias=compressor.ape.view(-1, compressor.head_dim),
            norm_weight=compressor.norm.weight,
            eps=compressor.norm.variance_epsilon,
        )

    def _plan(self, forward_batch: Any) -> StepPlan:
        seq_lens = forward_batch.seq_lens
        if forward_batch.forward_mode.is_decode():
            extend_lens = torch.ones_like(seq_lens)
        else:
            extend_lens = forward_batch.extend_seq_lens
        rows = torch.arange(len(seq_lens), device=seq_lens.device)
        longest = int(forward_batch.seq_lens_cpu.max())
        return self.cache.plan_tables(
            positions=forward_batch.positions,
            token_rows=torch.repeat_interleave(
                rows, extend_lens.long(), output_size=len(forward_batch.positions)
            ),
            seq_lens=seq_lens,
            extend_lens=extend_lens,
            state_slots=forward_batch.req_pool_indices,
            tables=self._tables(forward_batch.req_pool_indices, longest),
        )

    def _tables(self, req_pool_indices: torch.Tensor, longest: int) -> PageTables:
        page_tokens = self.cache.spec.page_tokens
        first_slots = self._req_to_token[req_pool_indices, :longest:page_tokens].long()  # [B, P]
        window_slots = self.token_to_kv_pool.translate_loc_from_full_to_swa(first_slots)
        return PageTables(
            history=first_slots // page_tokens, window=window_slots.long() // page_tokens
        )
