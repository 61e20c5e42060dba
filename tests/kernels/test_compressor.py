"""Pooling: the references against fp64, with the traps of the two streams as twins; the kernels against the references."""

import pytest
import torch
import triton
import triton.language as tl

from dsv4_kernels.compressor import naive_csa_pool, naive_hca_pool
from dsv4_kernels.compressor.fused import LOWEST_GATE, csa_pool, hca_finish, hca_update
from dsv4_kernels.device import EXACT
from dsv4_kernels.streams import csa_parts, slot_bias
from tests.kernels.interpreting import interpreted_checks


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


GATES = (0, 5, 7, (0, 1, 2), (1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 3, 4, 5, 6))


def pooled_ones(pool, gate, device="cpu"):
    """Pools of ones by a gate ``[8]``, of one block and one channel."""
    gate = torch.as_tensor(gate, device=device).view(1, 8, 1).expand(1, 8, 64).contiguous()
    return pool(torch.ones_like(gate), gate)


def csa_of_all(kv, gate):
    return naive_csa_pool(kv, gate, torch.ones(len(kv), dtype=torch.bool, device=kv.device))


def gate_faults(pool, device="cpu"):
    """Gates of -inf have no weight, wherever they stand; a block without weight, gates of +inf and NaN make NaN."""
    found = []
    for tokens in GATES:
        gate = torch.zeros(8)
        gate[torch.tensor(tokens)] = float("-inf")
        if not (pooled_ones(pool, gate, device) == 1.0).all():
            found.append(f"-inf of {tokens}")
    for value in (float("inf"), float("nan")):
        for token in (0, 3, 7):
            gate = torch.linspace(-1, 1, 8)
            gate[token] = value
            if not pooled_ones(pool, gate, device).isnan().all():
                found.append(f"{value} of {token}")
    if not pooled_ones(pool, torch.full((8,), float("-inf")), device).isnan().all():
        found.append("all -inf")
    return found


@pytest.mark.parametrize("pool", [csa_of_all, naive_hca_pool])
def test_gates_without_and_beyond_numbers(pool):
    assert gate_faults(pool) == []


@triton.jit
def pool_kernel(p_kv, p_gate, p_csa, p_hca, M: tl.constexpr, D: tl.constexpr):
    """Pool the ``M`` rows of one block, by both poolings."""
    o_d = tl.arange(0, D)
    p_block = tl.program_id(0) * M * D + o_d
    kv, gate = (), ()
    b_m = tl.full([D], LOWEST_GATE, tl.float32)
    b_s = tl.zeros([D], tl.float32)
    b_a = tl.zeros([D], tl.float32)
    for j in tl.static_range(M):
        b_kv, b_gate = tl.load(p_kv + p_block + j * D), tl.load(p_gate + p_block + j * D)
        kv, gate = kv + (b_kv,), gate + (b_gate,)
        b_m, b_s, b_a = hca_update(b_m, b_s, b_a, b_kv, b_gate)
    tl.store(p_csa + tl.program_id(0) * D + o_d, csa_pool(kv, gate))
    tl.store(p_hca + tl.program_id(0) * D + o_d, hca_finish(b_m, b_s, b_a))


def fused_pools(kv, gate):
    """Pools of blocks ``[N, M, D]`` by the kernels: CSA's and HCA's."""
    found = torch.full((2, len(kv), kv.shape[2]), float("nan"), device=kv.device)
    pool_kernel[(len(kv),)](kv, gate, found[0], found[1], kv.shape[1], kv.shape[2], **EXACT)
    return found


def check_small(device="cpu"):
    """Both poolings against the references, and a lost row is seen."""
    kv, gate = torch.randn(3, 8, 64, device=device), 4 * torch.randn(3, 8, 64, device=device)
    csa, hca = fused_pools(kv, gate)
    # An exponential by exp2 is off by 2^-22, and its argument, below 32, by 2^-24 (1 + 64).
    bound = rounding(8) * 8 * kv.abs().amax(1)
    for found, expected in ((csa, naive_csa_pool(kv, gate, gate[:, 0, 0] < 99)), (hca, naive_hca_pool(kv, gate))):
        assert ((found - expected).abs() <= bound).all()
        assert not ((found - naive_hca_pool(kv[:, :7], gate[:, :7])).abs() <= bound).all()
    for number in range(2):
        faults = gate_faults(lambda kv, gate, number=number: fused_pools(kv, gate)[number], device)
        assert faults == [], (number, faults)


SMALL = (check_small,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL)
def test_on_a_gpu(check):
    check(device="cuda")
