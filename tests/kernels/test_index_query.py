"""Index queries: the reference against keys rounded alike, the kernel against fp64, the numbering of tiles, machine code."""

from unittest import mock

import pytest
import torch

from dsv4_kernels.index_query import fused as index_query_fused
from dsv4_kernels.index_query import naive_index_query
from dsv4_kernels.index_query.fused import COUNTED_UNITS, index_query, index_query_kernel
from dsv4_kernels.layout import BF16_INDEX, FP8_INDEX, FP32_INDEX, INDEX_DIM, INDEX_FORMATS
from dsv4_kernels.row_codec import naive_load_rows, naive_store_rows
from tests.kernels.compiling import ARCHITECTURES, machine_code
from tests.kernels.index_world import FEW, RATIO, K, make_world
from tests.kernels.interpreting import interpreted_checks


def test_queries_are_rounded_as_keys_are():
    q, table = torch.randn(5, 3, INDEX_DIM), torch.randn(5, 64)
    plain = naive_index_query(q, table)
    for fmt in INDEX_FORMATS.values():
        rounded = naive_index_query(q, table, fmt)
        pool = torch.zeros(fmt.pool_shape(15), dtype=fmt.storage_dtype)
        naive_store_rows(pool, torch.arange(15), plain.view(15, -1), fmt)
        stored = naive_load_rows(pool, torch.arange(15), fmt).float().view_as(rounded)
        assert torch.equal(rounded, stored)
        assert torch.equal(rounded, plain) == (fmt is FP32_INDEX)


def query_faults(world, workspace, shift=0):
    """Scored tokens whose rotated queries are off by more than rounding; ``shift`` moves their positions."""
    tokens, heads = torch.nonzero(world.visible > K).flatten(), world.q.shape[1]
    positions = world.step.positions[tokens] + shift
    x = world.q[tokens].double()
    exact = naive_index_query(world.q[tokens], world.table[positions])
    # Two products and a sum, then seven sums and the scale, each to 2^-24 of its terms. The reference has as much.
    bound = 2 * 10 * 2.0**-24 * 2 * INDEX_DIM**-0.5 * x.abs().sum(-1, keepdim=True)
    found = workspace.query[tokens, :heads].double()
    scale = workspace.weights[tokens, :heads].double() / world.weights[tokens].double()
    assert (torch.frexp(scale).mantissa == 0.5).all(), "scales of queries: no power of two"
    if world.fmt is FP8_INDEX:
        # Four bits, the first included; below 2^-6 of a scale multiples of 2^-9 of it.
        bound = bound + torch.maximum(2.0**-4 * exact.abs(), 2.0**-10 * scale.unsqueeze(-1))
        largest = found.abs().amax(-1)
        assert ((largest > 208) & (largest <= 448)).all(), "a scale wastes bits"
    elif world.fmt is BF16_INDEX:
        bound = bound + 2.0**-8 * exact.abs()
    return int((~((found * scale.unsqueeze(-1) - exact).abs() <= bound)).sum())


def launch(world, unit, tile, first=0):
    """The launch alone, for the tokens from ``first`` on; the workspace."""
    workspace, count = world.workspace(), len(world.q) - first
    outputs = (workspace.stored_query, workspace.weights, workspace.first_tiles)
    index_query(world.step, world.q, world.weights, world.table, RATIO, K, *outputs, unit, tile, first, count)
    return workspace


def expected_tiles(world, unit, tile, first=0):
    """Tiles before each unit, and all of them, counted one by one."""
    visible = [count if count > K else 0 for count in world.visible[first:].tolist()]
    starts = [0]
    for at in range(0, len(visible), unit):
        starts.append(starts[-1] + -(-max(visible[at : at + unit]) // tile))
    return starts


def check_queries(world):
    """Rotated queries, weights, and tiles, from the first token on and from a later one."""
    workspace = launch(world, 2, 64)
    assert query_faults(world, workspace) == 0, world.fmt.name
    assert query_faults(world, workspace, shift=1) > 0, f"{world.fmt.name}: a wrong position"
    for unit, tile, first in ((2, 64, 0), (1, 32, 1)):
        starts = expected_tiles(world, unit, tile, first)
        assert launch(world, unit, tile, first).first_tiles[: len(starts)].tolist() == starts and starts[-1] > 0


def check_small(device="cpu"):
    """Every format; more units than are counted at once."""
    for fmt in INDEX_FORMATS.values():
        check_queries(make_world(fmt, FEW, device=device))
    with mock.patch.object(index_query_fused, "COUNTED_UNITS", 4):
        check_queries(make_world(BF16_INDEX, FEW, device=device, dtype=torch.bfloat16))


def check_many(device="cpu"):
    """More requests and units."""
    for fmt in INDEX_FORMATS.values():
        for dtype in (torch.float32, torch.bfloat16):
            check_queries(make_world(fmt, device=device, dtype=dtype))


SMALL = (check_small,)
CHECKS = (check_many,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("query", ["*u8", "*bf16"])
def test_machine_code(architecture, query):
    arguments = {
        "p_positions": "*i64",
        "first_token": "i32",
        "num_tokens": "i32",
        "p_q": "*bf16",
        "token_stride": "i32",
        "head_stride": "i32",
        "p_weights": "*bf16",
        "weight_stride": "i32",
        "p_cos_sin": "*fp32",
        "p_query": query,
        "p_scaled": "*fp32",
        "p_first_tiles": "*i32",
    }
    constants = {
        "HEADS": 64,
        "H": 64,
        "D": 128,
        "R": 64,
        "SCALE": 128**-0.5,
        "E": 16,
        "RATIO": RATIO,
        "K": 512,
        "UNIT": 2,
        "BS": 64,
        "BU": COUNTED_UNITS,
        "CASTS": architecture >= 89,
    }
    assert machine_code(index_query_kernel, arguments, constants, architecture, 4)
