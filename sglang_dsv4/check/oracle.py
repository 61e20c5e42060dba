"""What a DeepSeek-V4 checkpoint should answer, by transformers' full forward.

No cache of any kind takes part: every call runs the whole sequence at once. (transformers 5.12 decodes DeepSeek-V4
wrongly through its own cache; its full forward is right.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DeepseekV4ForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm, eager_attention_forward
from transformers.utils import logging

from sglang_dsv4.check.faults import Fault
from sglang_dsv4.check.rounding import ROUNDINGS

_ATTENTION = "sglang_dsv4_rounded_rows"


class Oracle:
    """Log-probabilities of one checkpoint, and how far rounding moves them.

    Every method takes one sequence and gives, for each of its positions, the distribution of the *next* token.
    Contexts must be short enough that the indexer selects everything (up to ``4 * index_topk`` tokens): where entries
    are left out, a rounding error may choose others, and no bound on rounding applies.

    Args:
        checkpoint (Path): a directory that transformers loads; held in fp32, and in fp64 and bf16 where asked for.
        device (str): where the forwards run; what they give is on the CPU.

    Raises:
        ValueError: a tensor of the checkpoint is missing, unknown or of another shape.
    """

    def __init__(self, checkpoint: Path, device: str = "cpu") -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._models: dict[torch.dtype, nn.Module] = {}
        self._answers: dict[tuple[Any, ...], torch.Tensor] = {}
        config = self._model(torch.float32).config
        self.vocab_size = int(config.vocab_size)
        self.index_topk = int(config.index_topk)

    def logprobs(
        self,
        token_ids: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        row_format: str | None = None,
        fault: Fault | None = None,
    ) -> torch.Tensor:
        """Log-probabilities of every next token.

        Args:
            token_ids (Sequence[int]): the sequence, at least one token.
            dtype (torch.dtype): arithmetic: float32, float64 or bfloat16.
            row_format (str | None): round every K=V row as this format stores it; None: not at all.
            fault (Fault | None): plant a bug; for proving that a comparison notices.

        Returns:
            torch.Tensor: ``[len(token_ids), vocab_size]``, fp32. Kept, and given again for the same question.

        Raises:
            ValueError: no token.
            KeyError: an unknown row format.
        """
        if not token_ids:
            raise ValueError("token_ids: expected at least one token, got none")
        # Rows of fp32 are exact, so the two questions are one.
        question = (tuple(token_ids), dtype, None if row_format == "fp32" else row_format, fault)
        if question not in self._answers:
            self._answers[question] = self._run(*question)
        return self._answers[question]

    def _run(self, token_ids: tuple[int, ...], dtype: torch.dtype, row_format: str | None, fault: Fault | None) -> torch.Tensor:
        model = self._model(dtype)
        rounding = None if row_format is None else ROUNDINGS[row_format]
        for layer in model.model.layers:
            layer.self_attn.row_rounding = rounding
        with torch.inference_mode(), nullcontext() if fault is None else fault.planted(model):
            ids = torch.tensor([list(token_ids)], device=self._device)
            logits = model(ids, use_cache=False).logits[0]
        return logits.double().log_softmax(dim=-1).float().cpu()

    def rounding_error(self, token_ids: Sequence[int], dtype: torch.dtype, row_format: str) -> torch.Tensor:
        """How far the row format, and the arithmetic ``dtype``, move this model's log-probabilities.

        Rows are rounded where a cache stores them: after norm and RoPE, window rows and entries alike.

        A server that is right makes these same rounding errors in other places or another order. Its distance from the
        exact log-probabilities is then of the size of this one, and `comparison_bound` allows twice that.

        Returns:
            torch.Tensor: ``[len(token_ids)]`` fp32, the largest change over the vocabulary at each position.
        """
        rounded = self.logprobs(token_ids, dtype=dtype, row_format=row_format)
        return (rounded - self.logprobs(token_ids)).abs().amax(dim=1)

    def arithmetic_error(self, token_ids: Sequence[int], row_format: str | None = None) -> torch.Tensor:
        """How far fp32 arithmetic moves this model's log-probabilities: fp32 against fp64.

        With a row format, both runs round their rows. Then most of the error comes from values that lie so near to the
        middle between two stored values that fp32 and fp64 round them to different sides.

        Returns:
            torch.Tensor: ``[len(token_ids)]`` fp32, the largest change over the vocabulary at each position.
        """
        single = self.logprobs(token_ids, row_format=row_format)
        double = self.logprobs(token_ids, row_format=row_format, dtype=torch.float64)
        return (single - double).abs().amax(dim=1)

    def _model(self, dtype: torch.dtype) -> nn.Module:
        if dtype not in self._models:
            self._models[dtype] = _load(self._checkpoint, dtype).to(self._device)
        return self._models[dtype]


def _load(checkpoint: Path, dtype: torch.dtype) -> nn.Module:
    loaded_in = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    with _quiet():
        model, info = DeepseekV4ForCausalLM.from_pretrained(
            checkpoint,
            dtype=loaded_in,
            attn_implementation=_ATTENTION,
            experts_implementation="eager",  # the grouped kernels have no fp64
            output_loading_info=True,
            local_files_only=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(f"{checkpoint}: expected every tensor to load, got {kind}: {sorted(info[kind])[:3]}")
    if dtype is torch.bfloat16:
        # transformers keeps norm weights in fp32, and then multiplies fp32 activations by bf16 matrices, which raises.
        for module in model.modules():
            if isinstance(module, DeepseekV4RMSNorm):
                module.to(torch.bfloat16)
    return model.to(torch.float64) if dtype is torch.float64 else model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers: it would write into that of the caller."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _attend_to_rounded_rows(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """transformers' eager attention over rounded rows. Key and value are one tensor: window rows, then entries."""
    del value
    rows = key if module.row_rounding is None else module.row_rounding(key)
    scaling = options["scaling"]
    return eager_attention_forward(module, query, rows, rows, mask, scaling=scaling)


AttentionInterface.register(_ATTENTION, _attend_to_rounded_rows)
AttentionMaskInterface.register(_ATTENTION, eager_mask)
