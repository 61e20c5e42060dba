"""Pooling against fp64, with the traps of the two streams as twins."""

import pytest
import torch

from dsv4_kernels.compress import naive_csa_pool, naive_hca_pool
from dsv4_kernels.streams import csa_parts, slot_bias


def rounding(num_tokens):
    """fp32 error of a softmax-weighted mean: per token an exp (2 ulp), a product, a sum and, online, two rescalings."""
    return 6 * num_tokens * 2.0**-24


def agrees(found, kv, gate, num_tokens):
    exact = (gate.double().softmax(1) * kv.double()).sum(1)
    return bool(((found - exact).abs() <= rounding(num_tokens) * kv.abs().amax(1)).all())


def test_csa_pool_is_one_softmax_over_both_blocks():
    kv, gate = torch.randn(50, 8, 512), 4 * torch.randn(50, 8, 512)
    found = naive_csa_pool(kv, gate, torch.ones(50, dtype=torch.bool))
    assert agrees(found, kv, gate, 8)
    halves = [naive_csa_pool(kv[:, s], gate[:, s], torch.ones(50, dtype=torch.bool)) for s in (slice(0, 4), slice(4, 8))]
    assert not agrees((halves[0] + halves[1]) / 2, kv, gate, 8)


def test_block_zero_has_no_previous_block_whatever_its_rows_hold():
    kv, gate = torch.randn(3, 8, 512), torch.randn(3, 8, 512)
    kv[:, :4], gate[:, :4] = float("nan"), float("nan")
    found = naive_csa_pool(kv, gate, torch.zeros(3, dtype=torch.bool))
    assert agrees(found, kv[:, 4:], gate[:, 4:], 4)
    zero_score = torch.cat([torch.zeros(3, 4, 512), gate[:, 4:]], 1)
    assert not agrees(found, torch.cat([torch.zeros(3, 4, 512), kv[:, 4:]], 1), zero_score, 8)


@pytest.mark.parametrize("spread", [0.5, 8.0])
def test_hca_pool(spread):
    kv, gate = torch.randn(6, 128, 512), spread * torch.randn(6, 128, 512)
    found = naive_hca_pool(kv, gate)
    assert agrees(found, kv, gate, 128)
    assert not agrees(naive_hca_pool(kv[:, :127], gate[:, :127]), kv, gate, 128)


def test_extreme_gates_stay_finite():
    kv, gate = torch.randn(2, 128, 512), torch.randn(2, 128, 512)
    gate[0, 5], gate[0, 6], gate[1] = 3e38, -3e38, -3e38
    found = naive_hca_pool(kv, gate)
    assert torch.equal(found[0], kv[0, 5])
    assert torch.isfinite(found).all()


def test_the_first_half_of_a_checkpoint_is_the_b_stream():
    row = torch.arange(4 * 3.0)
    kv_b, kv_a, gate_b, gate_a = csa_parts(row, 3)
    assert [part[0].item() for part in (kv_b, kv_a, gate_b, gate_a)] == [0, 3, 6, 9]
    ape = torch.tensor([[0.0, 1.0, 10.0, 11.0], [2.0, 3.0, 12.0, 13.0]])
    assert slot_bias(ape, 2).tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert slot_bias(ape, 4).tolist() == ape.tolist()
