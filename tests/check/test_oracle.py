"""The oracle: that it is transformers, and that its bounds let right answers pass and wrong ones not."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM

from sglang_dsv4.check.bound import comparison_bound
from sglang_dsv4.check.faults import DroppedBStream, Fault, SwappedStreams
from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.tiny.tokenizer import VOCAB_SIZE, byte_id

PROMPT = 266
FORMATS = ("fp32", "bf16", "fp8_584")
# What a server would have generated after a prompt of `PROMPT` tokens: the positions compared.
GENERATED = slice(PROMPT - 1, None)


def make_tokens(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(byte_id(32), byte_id(127), (count,), generator=generator).tolist()


TOKENS = make_tokens(PROMPT + 20)


def largest(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right)[GENERATED].abs().max().item()


@pytest.mark.parametrize("count", [1, 3, 4, 5, 127, 128, 129])
def test_equal_to_a_plain_model(checkpoint: Path, oracle: Oracle, count: int):
    """Our attention function, without rounding, is transformers' own."""
    model = DeepseekV4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    token_ids = make_tokens(count)
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids]), use_cache=False).logits[0].log_softmax(dim=-1)
    got = oracle.logprobs(token_ids)
    assert got.shape == (count, VOCAB_SIZE) and got.dtype is torch.float32
    # The experts' matrices are multiplied in another grouping: a few ulps of logits of size 10.
    assert (got - expected).abs().max() < 1e-4


def test_probabilities_sum_to_one(oracle: Oracle):
    total = oracle.logprobs(TOKENS).double().exp().sum(dim=1)
    assert (total - 1.0).abs().max() < 1e-6


def test_later_tokens_do_not_matter(oracle: Oracle):
    """One token more, one less: the positions before are the same to the precision of fp32."""
    error = oracle.arithmetic_error(TOKENS).max().item()
    shorter = oracle.logprobs(TOKENS[:-3])
    assert (oracle.logprobs(TOKENS)[:-3] - shorter).abs().max().item() <= comparison_bound(0.0, error)


def test_errors_are_in_order(oracle: Oracle):
    arithmetic = oracle.arithmetic_error(TOKENS)
    bf16 = oracle.rounding_error(TOKENS, torch.float32, "bf16")
    fp8 = oracle.rounding_error(TOKENS, torch.float32, "fp8_584")
    all_bf16 = oracle.rounding_error(TOKENS, torch.bfloat16, "bf16")
    for errors in (arithmetic, bf16, fp8, all_bf16):
        assert errors.shape == (len(TOKENS),) and errors.isfinite().all()
    assert 0 < arithmetic.max() < 1e-3 < bf16[GENERATED].max() < all_bf16[GENERATED].max()
    assert bf16[GENERATED].max() < fp8[GENERATED].max()


@pytest.mark.parametrize("row_format", FORMATS)
def test_bound_on_exact_rows(oracle: Oracle, row_format: str):
    """A right answer passes: bf16 arithmetic aside, what a server with rounded rows computes. A bug does not."""
    bound = comparison_bound(
        oracle.rounding_error(TOKENS, torch.float32, row_format)[GENERATED].max().item(),
        oracle.arithmetic_error(TOKENS)[GENERATED].max().item(),
    )
    exact = oracle.logprobs(TOKENS)
    assert largest(oracle.logprobs(TOKENS, row_format=row_format, dtype=torch.float64), exact) <= bound
    wrong = oracle.logprobs(TOKENS, row_format=row_format, fault=SwappedStreams())
    assert largest(wrong, exact) > bound


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("fault", [DroppedBStream(64), SwappedStreams()])
def test_bound_on_rounded_rows(oracle: Oracle, row_format: str, fault: Fault):
    """With the oracle's rows rounded too, one wrong entry of seventy is enough to be noticed."""
    arithmetic = oracle.arithmetic_error(TOKENS, row_format)[GENERATED].max().item()
    bound = comparison_bound(0.0, arithmetic)
    expected = oracle.logprobs(TOKENS, row_format=row_format)
    assert largest(oracle.logprobs(TOKENS, row_format=row_format, fault=fault), expected) > bound


def test_bound_on_bf16_arithmetic(oracle: Oracle):
    bound = comparison_bound(oracle.rounding_error(TOKENS, torch.bfloat16, "bf16")[GENERATED].max().item(), 0.0)
    exact = oracle.logprobs(TOKENS)
    assert largest(oracle.logprobs(TOKENS, dtype=torch.bfloat16), exact) <= bound
    assert largest(oracle.logprobs(TOKENS, dtype=torch.bfloat16, fault=SwappedStreams()), exact) > bound


@pytest.mark.parametrize("fault", [DroppedBStream(64), SwappedStreams()])
def test_a_fault_leaves_with_its_run(checkpoint: Path, fault: Fault):
    """And it moves nothing that comes before the entry it spoils."""
    oracle = Oracle(checkpoint)
    wrong = oracle.logprobs(TOKENS, fault=fault)
    right = oracle.logprobs(TOKENS)
    assert torch.equal(right, Oracle(checkpoint).logprobs(TOKENS))
    if isinstance(fault, DroppedBStream):
        assert torch.equal(wrong[:259], right[:259])
        assert not torch.equal(wrong[259:], right[259:])


def test_no_token_is_refused(oracle: Oracle):
    with pytest.raises(ValueError, match="token_ids"):
        oracle.logprobs([])


def test_a_missing_tensor_is_named(checkpoint: Path, tmp_path: Path):
    """transformers would draw it at random and go on."""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["layers.1.attn.compressor.ape"]
    save_file(tensors, str(broken / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.compressor\.position_bias"):
        Oracle(broken)
