"""Grammar masks and penalties against plain Python."""

import random

import pytest
import torch

from sglang_dsv4.plugin.install.portable import sampling_ops


def masked(logits, allowed):
    return [
        [value if token in tokens else float("-inf") for token, value in enumerate(row)]
        for row, tokens in zip(logits.tolist(), allowed, strict=True)
    ]


def allow_only(mask, allowed):
    mask.zero_()
    for row, tokens in enumerate(allowed):
        for token in tokens:
            word = mask[row, token // 32].item() & 0xFFFFFFFF | 1 << token % 32
            mask[row, token // 32] = word - (1 << 32) if word >= 1 << 31 else word


@pytest.mark.parametrize("vocab", [31, 32, 33, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_allowed_tokens_stay(vocab, dtype):
    rng = random.Random(vocab)
    allowed = [set(rng.sample(range(vocab), k)) for k in (1, vocab // 2, vocab)] + [{31 % vocab, vocab - 1}]
    mask = sampling_ops.allocate_bitmask(vocab, len(allowed))
    allow_only(mask, allowed)
    logits = torch.randn(len(allowed), vocab).to(dtype)
    expected = masked(logits, allowed)
    sampling_ops.mask_logits(logits, mask)
    assert logits.tolist() == expected
    assert expected != masked(logits, [*allowed[1:], allowed[0]])


def test_a_new_mask_allows_everything():
    logits = torch.randn(3, 100)
    before = logits.clone()
    sampling_ops.mask_logits_of_grammar(None, logits=logits, vocab_mask=sampling_ops.allocate_bitmask(100, 3))
    assert torch.equal(logits, before)


def test_tokens_beyond_the_mask_stay():
    logits = torch.randn(1, 70)
    before = logits.clone()
    sampling_ops.mask_logits(logits, torch.zeros(1, 2, dtype=torch.int32))
    assert bool((logits[:, :64] == float("-inf")).all()) and torch.equal(logits[:, 64:], before[:, 64:])


def test_strided_logits_are_masked_in_place():
    wide = torch.randn(2, 80)
    before = wide.clone()
    sampling_ops.mask_logits(wide[:, 10:42], torch.zeros(2, 1, dtype=torch.int32))
    assert bool((wide[:, 10:42] == float("-inf")).all())
    assert torch.equal(wide[:, :10], before[:, :10]) and torch.equal(wide[:, 42:], before[:, 42:])


def test_repetition_penalty():
    logits, penalties = torch.randn(4, 32), 1 + torch.rand(4, 32)
    expected = [
        [z * p if z < 0 else z / p for z, p in zip(row, row_penalties, strict=True)]
        for row, row_penalties in zip(logits.tolist(), penalties.tolist(), strict=True)
    ]
    unpenalised = logits.clone()
    sampling_ops.scale_penalties(logits, penalties)
    # One rounding of fp32.
    exact = torch.tensor(expected, dtype=torch.float64)
    assert ((logits - exact).abs() <= 2.0**-24 * exact.abs()).all()
    assert not ((unpenalised - exact).abs() <= 2.0**-24 * exact.abs()).all()


@pytest.mark.sglang
def test_masks_have_the_shape_that_xgrammar_fills():
    from xgrammar import bitmask_dtype, get_bitmask_shape

    for vocab, batch in ((1, 1), (32, 2), (33, 3), (129280, 4)):
        mask = sampling_ops.allocate_bitmask(vocab, batch)
        assert tuple(mask.shape) == tuple(get_bitmask_shape(batch, vocab)) and mask.dtype == bitmask_dtype
