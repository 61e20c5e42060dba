"""Entries of a sequence in fp64, from the report's equations, without the package's own references."""

from functools import cache

import torch

from dsv4_kernels.layout import RowFormat
from sglang_dsv4.spec import LayerSpec
from tests.cache.driver import CompressorInput

# One rounding to bf16; fp32 arithmetic of up to 300 roundings; fp32 angles of positions below 4,096 (see test_oracle.py).
BF16 = 2.0**-8
FP32 = (300 + 3 * 4096) * 2.0**-24


def _rotate(rows: torch.Tensor, positions: torch.Tensor, layer: LayerSpec) -> torch.Tensor:
    pair = torch.arange(32, dtype=torch.float64)
    freq = layer.rope.theta ** (-2 * pair / 64)
    ramp = ((pair - 15) / 10).clamp(0, 1)  # 32 and 1 rotations over 65,536 positions: pairs 15 to 25
    freq = freq * (1 - ramp) + freq / 16 * ramp
    turn = torch.polar(torch.ones(len(rows), 32, dtype=torch.float64), positions[:, None] * freq)
    pairs = torch.view_as_complex(rows[:, -64:].reshape(len(rows), 32, 2).contiguous())
    return torch.cat([rows[:, :-64], torch.view_as_real(pairs * turn).flatten(1)], dim=1)


def entries(given: CompressorInput, layer: LayerSpec, rotate: bool) -> torch.Tensor:
    """Every closed block's entry, ``[N, D]`` fp64; index keys if ``rotate``."""
    m, dim = layer.ratio, len(given.norm_weight)
    count = len(given.kv_score) // m
    if count == 0:
        return torch.zeros(0, dim, dtype=torch.float64)
    rows = given.kv_score[: count * m].double().view(count, m, -1, dim)  # [N, m, parts, D]
    bias = given.slot_bias.double()
    if layer.overlap:
        kv_b, kv_a, gate_b, gate_a = rows.unbind(2)
        gate_a, gate_b = gate_a + bias[m:], gate_b + bias[:m]
        before_kv, before_gate = torch.zeros_like(kv_b), torch.full_like(gate_b, float("-inf"))
        before_kv[1:], before_gate[1:] = kv_b[:-1], gate_b[:-1]
        kv, gate = torch.cat([before_kv, kv_a], 1), torch.cat([before_gate, gate_a], 1)
    else:
        kv, gate = rows.unbind(2)
        gate = gate + bias
    raw = (gate.softmax(1) * kv).sum(1)
    normed = raw / (raw.square().mean(-1, keepdim=True) + given.eps).sqrt() * given.norm_weight.double()
    found = _rotate(normed, torch.arange(count) * m, layer)
    return found @ _signs(dim) / dim**0.5 if rotate else found


@cache
def _signs(dim: int) -> torch.Tensor:
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(dim)] for i in range(dim)]
    return torch.tensor(signs, dtype=torch.float64)


def rounding(fmt: RowFormat) -> tuple[torch.Tensor, float]:
    """How far one rounding to a format may move a value: per channel relative to it, and relative to the row's largest.

    e4m3 has three bits behind the point; its smallest step is 2^-9 of a scale, which is at most 2/448 of the largest value.
    """
    relative, smallest = torch.full((fmt.dim,), FP32), 0.0
    if fmt.storage_dtype == torch.bfloat16:
        relative = torch.full((fmt.dim,), BF16)
    elif fmt.group_rows > 1:
        relative, smallest = torch.full((fmt.dim,), 2.0**-4), 2.0**-10 * 2 / 448
        if fmt.dim == 512:
            relative[-64:] = BF16
    return relative.double(), smallest


def excess(found: torch.Tensor, expected: torch.Tensor, fmt: RowFormat) -> float:
    """Largest error beyond what rounding explains; not above 0 when they agree."""
    if not len(expected):
        return 0.0
    relative, smallest = rounding(fmt)
    scale = expected.abs().amax(1, keepdim=True)
    allowed = relative * expected.abs() + (2 * FP32 + smallest) * scale
    return ((found.double() - expected).abs() - allowed).max().item()
