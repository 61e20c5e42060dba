"""Runtimes for tests, and what their answers are held against."""

from pathlib import Path

import torch

from sglang_dsv4 import Runtime
from sglang_dsv4.check.bound import comparison_bound
from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.tiny import TinySpec
from sglang_dsv4.tiny.tokenizer import byte_id

# One layer of each kind, at widths that make a step a few milliseconds.
SMALL = TinySpec(
    compress_ratios=(0, 4, 128),
    hidden_size=64,
    num_heads=2,
    o_groups=1,
    o_lora_rank=32,
    q_lora_rank=32,
    num_experts=2,
    experts_per_token=1,
    moe_width=32,
    num_hash_layers=1,
)
# Exact arithmetic and exact rows: what is left is the order of fp32 operations.
EXACT = {"dtype": "float32", "row_format": "fp32"}


def make_runtime(checkpoint: Path, **options) -> Runtime:
    """Small pages, exact rows."""
    return Runtime(checkpoint, **{**EXACT, "num_pages": 24, "page_tokens": 128, **options})


def make_tokens(count: int, salt: int = 0) -> list[int]:
    """Printable bytes."""
    generator = torch.Generator().manual_seed(1000 * salt + count)
    return torch.randint(byte_id(32), byte_id(127), (count,), generator=generator).tolist()


def logprobs_behind(handle) -> torch.Tensor:
    """The log-probabilities that the runtime would draw the next token from."""
    return handle.live().logits.log_softmax(dim=-1)


def bound(oracle: Oracle, tokens: list[int]) -> float:
    """How far fp32 arithmetic may put two right answers apart."""
    return comparison_bound(0.0, oracle.arithmetic_error(tokens).max().item())


def assert_right(oracle: Oracle, handle) -> None:
    """What follows the handle's last token is what a full forward of its tokens gives."""
    tokens = list(handle.tokens)
    error = (logprobs_behind(handle) - oracle.logprobs(tokens)[-1]).abs().max().item()
    assert error <= bound(oracle, tokens), f"{len(tokens)} tokens: {error:.1e}"


def assert_greedy(oracle: Oracle, prompt: list[int], generated) -> None:
    """Each token is the most likely one behind those before it, up to the error of two log-probabilities."""
    tokens = [*prompt, *generated]
    rows = oracle.logprobs(tokens)[len(prompt) - 1 : -1]
    picked = rows.gather(1, torch.tensor(list(generated)).unsqueeze(1)).squeeze(1)
    assert (rows.amax(dim=1) - picked).max().item() <= 2 * bound(oracle, tokens)


def assert_nothing_held(runtime: Runtime) -> None:
    """Every page and slot is free once the index lets go."""
    runtime.engine.collect()
    runtime.engine.index.clear()
    runtime.cache.check_integrity(memory=True)
    counts = runtime.cache.requests.allocator.counts()
    for kind in ("history_pages", "window_pages", "state_slots"):
        assert counts[f"{kind}_free"] == counts[kind]
