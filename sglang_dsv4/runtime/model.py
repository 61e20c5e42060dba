"""A transformers DeepSeek-V4 model whose attention reads and writes a `CompressedKVCache`."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from sglang_dsv4.attention import EagerAttention
from sglang_dsv4.cache import CompressedKVCache, StepPlan
from sglang_dsv4.runtime.attention import CachedAttention, StepInProgress


class CachedModel:
    """One step of many sequences at once.

    The sequences' new tokens stand behind each other in one row of the model's input. There is no padding: a padded token
    would be pooled into its block.

    Args:
        model (nn.Module): a `DeepseekV4ForCausalLM`; its attention modules get another ``forward``.
        cache (CompressedKVCache): of the model's spec, on its device.
    """

    def __init__(self, model: nn.Module, cache: CompressedKVCache) -> None:
        self.model = model
        self.cache = cache
        self._attention = EagerAttention(cache)
        self._step = StepInProgress()
        for layer in model.model.layers:
            module = layer.self_attn
            module.forward = CachedAttention(module, cache, self._attention, self._step)

    @torch.no_grad()
    def run(self, plan: StepPlan, tokens: Sequence[int]) -> torch.Tensor:
        """Feed each sequence of a plan its next tokens, and commit.

        Args:
            plan (StepPlan): from the cache's ``plan``, at least one token for each sequence.
            tokens (Sequence[int]): those of the first sequence, then those of the second, and so on.

        Returns:
            torch.Tensor: ``[sequences, vocab]`` fp32, the logits that follow each sequence's last token.
        """
        device = self.cache.device
        last = [end - 1 for end in accumulate(item.num_new_tokens for item in plan.items)]
        self._attention.begin(plan)
        self._step.plan = plan
        try:
            output = self.model(
                input_ids=torch.tensor([list(tokens)], device=device),
                position_ids=plan.step.positions.unsqueeze(0),
                attention_mask={"packed": None},  # a dictionary is taken as it is: no mask is built
                use_cache=False,
                logits_to_keep=torch.tensor(last, device=device),
            )
        finally:
            self._step.plan = None
        self.cache.commit(plan)
        return output.logits[0].float()
