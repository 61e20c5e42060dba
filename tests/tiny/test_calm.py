"""Calm weights: in bf16 and over fp8 rows, rounding stays far below what a wrong cache does, and most tokens are certain."""

from pathlib import Path

import pytest
import torch

from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.tiny import SHAPES, TinySpec, write_tiny_checkpoint
from sglang_dsv4.tiny.tokenizer import byte_id

pytestmark = pytest.mark.long

NUM_TOKENS = 560
PAGE = 256
# Behind the first page and its window, so that only entries still know of it.
MEASURED = slice(NUM_TOKENS - 128, NUM_TOKENS)


def prompts() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt, and the same with another first page."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(byte_id(32), byte_id(127), (NUM_TOKENS + PAGE,), generator=generator)
    right = ids[:NUM_TOKENS].tolist()
    return tuple(right), (*ids[NUM_TOKENS:].tolist(), *right[PAGE:])


def measure(folder: Path, scales: str) -> tuple[float, float, float]:
    """What rounding and a wrong page move the likeliest token's log-probability by, as root mean squares; and the share of
    tokens whose two best are further apart than two right servers may be, each off by twice the largest error of rounding.
    """
    shape = {**SHAPES["heads64"], "scales": scales}
    write_tiny_checkpoint(folder, TinySpec(rope_factor=1, **shape))
    oracle = Oracle(folder)
    prompt, wrong = prompts()
    exact = oracle.logprobs(prompt)[MEASURED]
    best, ids = exact.topk(2, dim=-1)
    likeliest = ids[:, :1]

    def moved(found: torch.Tensor) -> torch.Tensor:
        return (found[MEASURED] - exact).gather(1, likeliest)

    rounding = moved(oracle.logprobs(prompt, dtype=torch.bfloat16, row_format="fp8_584"))
    fault = moved(oracle.logprobs(wrong))
    certain = best[:, 0] - best[:, 1] > 4 * rounding.abs().max()
    rms = [values.square().mean().sqrt().item() for values in (rounding, fault)]
    return *rms, certain.float().mean().item()


def test_rounding_moves_a_calm_model_little(tmp_path: Path):
    rounding, fault, certain = measure(tmp_path, "calm")
    assert rounding < 0.07 and fault > 15 * rounding, (rounding, fault)
    assert certain > 0.35, certain


def test_and_a_sharp_one_much(tmp_path: Path):
    """The twin: of a sharp model next to no token could be judged."""
    rounding, _, certain = measure(tmp_path, "sharp")
    assert rounding > 0.2 and certain < 0.05, (rounding, certain)
