"""What SGLang does to logits before sampling, in plain torch, for requests that would otherwise stop a CPU server."""

from typing import Any

import torch

_BITS = 32


def allocate_bitmask(vocab_size: int, batch_size: int) -> torch.Tensor:
    """Allocate the bit masks of a grammar, with every token allowed.

    Args:
        vocab_size (int): tokens V.
        batch_size (int): requests B.

    Returns:
        torch.Tensor: ``[B, ceil(V / 32)]``, int32, in ordinary memory; bit ``i`` of word ``w`` is token ``32 w + i``.
    """
    return torch.full((batch_size, (vocab_size + _BITS - 1) // _BITS), -1, dtype=torch.int32)


def mask_logits(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Forbid the tokens whose bit is 0.

    Args:
        logits (torch.Tensor): ``[B, V]``, any float; overwritten with -inf where forbidden. Tokens beyond the mask stay.
        vocab_mask (torch.Tensor): ``[B, W]``, int32, as in `allocate_bitmask`.
    """
    bits = torch.arange(_BITS, dtype=torch.int32, device=vocab_mask.device)
    allowed = (vocab_mask.unsqueeze(-1) >> bits & 1).flatten(-2).bool()  # [B, 32 W]
    width = min(logits.shape[-1], allowed.shape[-1])
    logits[..., :width].masked_fill_(~allowed[..., :width], float("-inf"))


def mask_logits_of_grammar(grammar: Any, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """`mask_logits`, as a method of SGLang's XGrammarGrammar."""
    del grammar
    mask_logits(logits, vocab_mask)


def scale_penalties(logits: torch.Tensor, scaling_penalties: torch.Tensor) -> None:
    """Apply repetition penalties.

    Equation:
        z <- z p where z < 0, else z / p

    Args:
        logits (torch.Tensor): ``[B, V]``, overwritten.
        scaling_penalties (torch.Tensor): ``[B, V]``, > 0.
    """
    logits.copy_(torch.where(logits < 0, logits * scaling_penalties, logits / scaling_penalties))
