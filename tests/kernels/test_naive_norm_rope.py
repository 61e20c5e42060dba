"""RMSNorm, RoPE, its table, and the Hadamard rotation."""

import pytest
import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from dsv4_kernels.hadamard import naive_hadamard
from dsv4_kernels.norm_rope import RopeSpec, naive_rms_norm, naive_rope, rope_table
from tests.cache.driver import CONFIG, make_spec

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


def test_hadamard_matches_its_matrix_and_is_its_own_inverse():
    x = torch.randn(5, 2, 128)
    signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(128)] for i in range(128)]).double()
    expected = x.double() @ signs / 128**0.5
    # Seven levels of additions and one product, of magnitudes up to sum |x| / sqrt(128).
    bound = 8 * 2.0**-24 * x.abs().sum(-1, keepdim=True) / 128**0.5
    assert ((naive_hadamard(x) - expected).abs() <= bound).all()
    assert ((naive_hadamard(naive_hadamard(x)) - x).abs() <= 20 * 2.0**-24 * x.abs().sum(-1, keepdim=True)).all()
    assert not ((naive_hadamard(x.flip(-1)) - expected).abs() <= bound).all()
