"""transformers' attention module with its memory replaced: its weights and projections, our cache and attention."""

from typing import Any

import torch
from torch import nn

from dsv4_kernels.norm_rope import naive_rope
from dsv4_kernels.streams import slot_bias
from sglang_dsv4.attention import Attention
from sglang_dsv4.cache import CompressedKVCache, CompressorWeights, NormWeights, StepPlan
from sglang_dsv4.cache.regions import Part


class StepInProgress:
    """The plan of the step that the model is computing; one for all layers."""

    def __init__(self) -> None:
        self.plan: StepPlan | None = None

    def current(self) -> StepPlan:
        """The plan.

        Raises:
            RuntimeError: the model was called by somebody else than the runtime.
        """
        if self.plan is None:
            raise RuntimeError("the model's attention belongs to a Runtime: expected a call through it, got a direct one")
        return self.plan


class CachedAttention:
    """Stands in for ``DeepseekV4Attention.forward``: tokens of many sequences, packed into one row, without a mask."""

    def __init__(self, module: nn.Module, cache: CompressedKVCache, attention: Attention, step: StepInProgress) -> None:
        self._module = module
        self._attention = attention
        self._step = step
        self._layer = cache.layers[module.layer_idx]
        norm = module.kv_norm
        self._layer.bind(window=NormWeights(norm.weight, norm.variance_epsilon))
        for part, compressor in self._compressors().items():
            bias = slot_bias(compressor.position_bias.detach().float(), compressor.head_dim)
            norm = compressor.kv_norm
            self._layer.bind(**{part: CompressorWeights(bias, norm.weight, norm.variance_epsilon)})

    def __call__(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Attend.

        Args:
            hidden_states (torch.Tensor): ``[1, T, hidden]``, the layer's normed input, in the order of the step's tokens.
            **_ (Any): positions and masks of transformers; the plan has them.

        Returns:
            tuple[torch.Tensor, None]: ``[1, T, hidden]``, and no weights.
        """
        module, plan, x = self._module, self._step.current(), hidden_states[0]
        num_tokens = len(x)
        cos_sin = self._layer.rope_table[plan.step.positions]  # [T, 64]
        latent = module.q_a_norm(module.q_a_proj(x))
        q = module.q_b_norm(module.q_b_proj(latent).view(num_tokens, -1, module.head_dim))
        self._append(plan, x)
        selected = self._select(plan, x, latent) if Part.INDEX in self._layer.parts else None
        out = self._attention.run(self._layer, naive_rope(q, cos_sin).to(x.dtype), module.sinks, selected)
        out = naive_rope(out, cos_sin, inverse=True).to(x.dtype)  # [T, H, 512]
        grouped = out.reshape(1, num_tokens, module.config.o_groups, -1)
        return module.o_b_proj(module.o_a_proj(grouped).flatten(2)), None

    def _compressors(self) -> dict[str, nn.Module]:
        compressor = self._module.compressor
        if compressor is None:
            return {}
        found = {"main": compressor}
        return {**found, "index": compressor.indexer} if Part.INDEX in self._layer.parts else found

    def _append(self, plan: StepPlan, x: torch.Tensor) -> None:
        projections = {
            part: torch.cat([compressor.kv_proj(x), compressor.gate_proj(x)], dim=-1)
            for part, compressor in self._compressors().items()
        }
        self._layer.append(plan, window=self._module.kv_proj(x), **projections)

    def _select(self, plan: StepPlan, x: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        indexer = self._module.compressor.indexer
        scorer = indexer.scorer
        q = indexer.q_b_proj(latent).view(len(x), indexer.num_heads, indexer.head_dim)
        scale = scorer.softmax_scale * scorer.weights_scaling
        weights = scorer.weights_proj(x).float() * scale
        numbering = self._attention.numbering
        return self._layer.select(plan, q, weights, numbering=numbering)
