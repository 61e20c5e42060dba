"""Choosing the next token."""

import math

import torch

from sglang_dsv4.runtime.arguments import number


class Sampler:
    """Draws tokens from logits; the same seed draws the same tokens from the same logits, whatever else is in the batch.

    Args:
        temperature (float): 0 takes the most likely token.
        seed (int | None): None takes one from torch's own generator.

    Raises:
        ValueError: a negative or infinite temperature.
    """

    def __init__(self, temperature: float, seed: int | None) -> None:
        temperature = number("temperature", temperature)
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature: expected a number of 0 or more, got {temperature}")
        self._temperature = temperature
        drawn = int(torch.randint(2**62, ())) if seed is None else seed
        self._generator = torch.Generator().manual_seed(drawn)

    def choose(self, logits: torch.Tensor) -> int:
        """A token id from ``[vocab]`` fp32 logits."""
        if self._temperature == 0:
            return int(logits.argmax())
        weights = (logits.cpu().double() / self._temperature).softmax(dim=-1)
        return int(torch.multinomial(weights, 1, generator=self._generator))
