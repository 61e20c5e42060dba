"""RMSNorm, RoPE and its table against fp64 and transformers, and the kernels against the references."""

import pytest
import torch
import triton
import triton.language as tl

from dsv4_kernels.device import EXACT
from dsv4_kernels.hadamard import naive_hadamard
from dsv4_kernels.layout import FP32_INDEX, FP32_ROW
from dsv4_kernels.norm_rope import RopeSpec, naive_rms_norm, naive_rope, rope_table
from dsv4_kernels.norm_rope.fused import store_normed
from dsv4_kernels.row_codec.fused import store_format
from tests.cache.driver import CONFIG, make_spec
from tests.kernels.interpreting import interpreted_checks

# Relative error of a sum of 512 squares by halving (9 additions, one product), a root, a quotient and two products.
NORM_ERROR = 16 * 2.0**-24


@pytest.mark.parametrize("dim", [128, 512])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_matches_fp64(dim, weighted):
    x = torch.randn(33, dim) * torch.exp(3 * torch.randn(33, 1))
    weight = torch.rand(dim) + 0.5 if weighted else None
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = exact * weight.double() if weighted else exact

    def agrees(found):
        return bool(((found - exact).abs() <= NORM_ERROR * exact.abs()).all())

    assert agrees(naive_rms_norm(x, weight, 1e-6))
    assert not agrees(naive_rms_norm(x, weight, 1e-3 * x.square().mean().item()))


def test_rms_norm_of_a_row_does_not_depend_on_its_batch():
    x = torch.randn(77, 512)
    together = naive_rms_norm(x, None, 1e-6)
    assert all(torch.equal(together[i : i + 1], naive_rms_norm(x[i : i + 1], None, 1e-6)) for i in range(77))


@pytest.mark.parametrize("kind", ["main", "compress"])
def test_tables_equal_transformers_bit_for_bit(kind):
    """Frequencies and tables of window-only ("main", plain) and compressing ("compress", YaRN) layers."""
    # Not at the top: the interpreting process imports this module, and not transformers.
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

    config = DeepseekV4Config(**{key: value for key, value in CONFIG.items() if key != "model_type"})
    positions = torch.arange(700)
    cos, sin = DeepseekV4RotaryEmbedding(config)(torch.zeros(1), positions.unsqueeze(0), layer_type=kind)
    rope = make_spec().layers[0 if kind == "main" else 1].rope
    table = rope_table(rope, 700)
    assert torch.equal(table[:, :32], cos[0]) and torch.equal(table[:, 32:], sin[0])
    assert not torch.equal(rope_table(RopeSpec(rope.theta + 1, 64), 700)[:, :32], cos[0])


def test_rope_is_a_complex_product_of_interleaved_pairs_and_has_an_inverse():
    x, table = torch.randn(9, 3, 512), rope_table(make_spec().layers[1].rope, 9)
    pairs = torch.view_as_complex(x[..., 448:].double().view(9, 3, 32, 2))
    turn = torch.complex(table[:, :32].double(), table[:, 32:].double()).unsqueeze(1)
    expected = torch.view_as_real(pairs * turn).flatten(-2)
    found = naive_rope(x, table)
    assert torch.equal(found[..., :448], x[..., :448])
    # Two products and a sum of values below |pair|: three roundings of 2^-24.
    assert ((found[..., 448:] - expected).abs() <= 3 * 2.0**-24 * pairs.abs().repeat_interleave(2, -1)).all()
    back = naive_rope(found, table, inverse=True)
    assert (back - x).abs().max() <= 8 * 2.0**-24 * x.abs().max()
    assert (naive_rope(found, table) - x).abs().max() > 0.1


@triton.jit
def norm_kernel(
    p_x,
    p_weight,
    p_table,
    p_pool,
    E: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    ROTATE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Norm, rotate and store ``E`` rows, in chunks of ``C`` channels; row ``i`` is at position ``i``."""
    o_e = tl.arange(0, E)
    chunks = ()
    for c in tl.static_range(D // C):
        chunks = chunks + (tl.load(p_x + o_e[:, None] * D + c * C + tl.arange(0, C)[None, :]),)
    store_normed(chunks, p_weight, 1e-6, p_table + o_e * R, p_pool, o_e, o_e >= 0, E, D, R, ROTATE, FORMAT, False)


def check_small(device="cpu"):
    """Norm and RoPE against the references, the same bytes by whole rows and by chunks; another position is seen."""
    table = rope_table(make_spec().layers[1].rope, 9, device)
    for fmt, rotate in ((FP32_ROW, False), (FP32_INDEX, True)):
        x = torch.randn(8, fmt.dim, device=device) * torch.exp(3 * torch.randn(8, 1, device=device))
        weight = torch.rand(fmt.dim, device=device) + 0.5
        pools = []
        for chunk in {128, fmt.dim}:
            pools.append(torch.full_like(x, float("nan")))
            norm_kernel[(1,)](x, weight, table, pools[-1], 8, chunk, fmt.dim, 64, rotate, store_format(fmt), **EXACT)
        assert all(torch.equal(pool, pools[0]) for pool in pools)
        for shift in (0, 1):
            expected = naive_rope(naive_rms_norm(x, weight, 1e-6), table[shift : 8 + shift])
            expected = naive_hadamard(expected) if rotate else expected
            # Two norms that add in different orders, and a rotation of 2 or 130 of their values.
            bound = (3 if not rotate else 10) * NORM_ERROR * expected.abs().amax(-1, keepdim=True)
            assert ((pools[0] - expected).abs() <= bound).all() == (shift == 0), (fmt.name, rotate, shift)


SMALL = (check_small,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL)
def test_on_a_gpu(check):
    check(device="cuda")
