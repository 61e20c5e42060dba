"""The Hadamard rotation: the reference against its matrix, and the kernel to the bit."""

import pytest
import torch
import triton
import triton.language as tl

from dsv4_kernels.device import EXACT
from dsv4_kernels.hadamard import naive_hadamard
from dsv4_kernels.hadamard.fused import hadamard_rows
from tests.kernels.interpreting import interpreted_checks


def test_hadamard_matches_its_matrix_and_is_its_own_inverse():
    x = torch.randn(5, 2, 128)
    signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(128)] for i in range(128)]).double()
    expected = x.double() @ signs / 128**0.5
    # Seven levels of additions and one product, of magnitudes up to sum |x| / sqrt(128).
    bound = 8 * 2.0**-24 * x.abs().sum(-1, keepdim=True) / 128**0.5
    assert ((naive_hadamard(x) - expected).abs() <= bound).all()
    assert ((naive_hadamard(naive_hadamard(x)) - x).abs() <= 20 * 2.0**-24 * x.abs().sum(-1, keepdim=True)).all()
    assert not ((naive_hadamard(x.flip(-1)) - expected).abs() <= bound).all()


@triton.jit
def rotate_kernel(p_x, p_y, E: tl.constexpr, D: tl.constexpr):
    """Rotate ``E`` rows."""
    o_x = tl.arange(0, E)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(p_y + o_x, hadamard_rows(tl.load(p_x + o_x), E, D, D**-0.5))


def check_small(device="cpu"):
    """The rotation, to the bit."""
    x = torch.randn(8, 128, device=device)
    rotated = torch.full_like(x, float("nan"))
    rotate_kernel[(1,)](x, rotated, 8, 128, **EXACT)
    assert torch.equal(rotated, naive_hadamard(x))


SMALL = (check_small,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL)
def test_on_a_gpu(check):
    check(device="cuda")
