"""Index scores: the reference against fp64, the kernel within its bound, machine code."""

from unittest import mock

import pytest
import torch
import triton.language as tl

from dsv4_kernels.index_query import fused as index_query_fused
from dsv4_kernels.index_score import fused as index_score_fused
from dsv4_kernels.index_score import naive_index_scores
from dsv4_kernels.index_score.bound import score_bound
from dsv4_kernels.index_score.fused import index_scores_kernel, score_entries
from dsv4_kernels.index_score.tuning import IndexTuning, index_tuning, rows_together
from dsv4_kernels.index_score.workspace import held_scores
from dsv4_kernels.index_topk import GROUP
from dsv4_kernels.layout import BF16_INDEX, FP8_INDEX, FP32_INDEX, INDEX_FORMATS
from dsv4_kernels.row_codec.fused import store_format
from tests.kernels.compiling import ARCHITECTURES, machine_code
from tests.kernels.index_world import FEW, RATIO, K, exact_world, make_world
from tests.kernels.interpreting import interpreted_checks


def test_scores_match_fp64():
    q, weights, keys = torch.randn(7, 16, 128), torch.randn(7, 16), torch.randn(30, 128)
    dots = torch.einsum("thd,sd->ths", q.double(), keys.double()).clamp_min(0)
    exact = (dots * weights.double().unsqueeze(1).transpose(1, 2)).sum(1)
    # 128 products and sums per dot, 16 per score; magnitudes bounded by the same sums of absolute values.
    bound = torch.einsum("thd,sd,th->ts", q.abs().double(), keys.abs().double(), weights.abs().double())
    bound = bound * (128 + 16) * 2.0**-24
    found = naive_index_scores(q, weights, keys)
    assert ((found - exact).abs() <= bound).all()
    without_relu = torch.einsum("thd,sd,th->ts", q.double(), keys.double(), weights.double())
    assert not ((found - without_relu).abs() <= bound).all()


def test_a_tile_lies_in_two_parts_at_most():
    assert rows_together(64, FP8_INDEX, 128) == 64 and rows_together(64, FP8_INDEX, 32) == 32
    assert rows_together(96, BF16_INDEX, 64) == 32 and rows_together(256, FP8_INDEX, 128) == 64
    with pytest.raises(ValueError, match="tile: expected at most 64 entries for pages of 32, got 128"):
        rows_together(32, FP32_INDEX, 128)


def score_faults(world, workspace, *, relu=True, shift=0):
    """Scores off by more than rounding from fp64 over the rounded queries; twins leave the ReLU out or shift keys."""
    faults = 0
    for token in torch.nonzero(world.visible > K).flatten().tolist():
        keys = world.keys(token).roll(shift, 0)
        q = workspace.query[token, : world.q.shape[1]].double()
        weights = workspace.weights[token, : world.q.shape[1]].double()
        dots = q @ keys.T
        dots = dots.clamp_min(0) if relu else dots
        bound = score_bound(q, weights, keys, e4m3=world.fmt is FP8_INDEX)
        found = world.scores(workspace)[token, : len(keys)].double()
        faults += int((~((found - weights @ dots).abs() <= bound)).sum())
    return faults


def wrong_maxima(world, workspace):
    """Groups of a scored token whose maximum is not that of its visible scores."""
    held, faults = held_scores(world.step, RATIO, workspace), 0
    for token in torch.nonzero(world.visible > K).flatten().tolist():
        count = int(world.visible[token])
        scores = held.scores[token].clone()
        scores[count:] = float("-inf")
        expected = scores.view(-1, GROUP).amax(1)[: -(-count // GROUP)]
        faults += int((held.maxima[token, : len(expected)] != expected).sum())
    return faults


def scored(world, tuning=None):
    """The workspace after the scores of all tokens."""
    workspace, count = world.workspace(), len(world.q)
    if tuning is None:
        tuning = index_tuning(count, len(world.step.seq_lens), world.fmt is FP32_INDEX)
    query = (workspace.stored_query, workspace.weights, workspace.first_tiles)
    inputs = (world.q, world.weights, world.table, RATIO, K)
    index_query_fused.index_query(world.step, *inputs, *query, tuning.unit, tuning.entries, 0, count)
    score_entries(world.step, world.pool, world.fmt, RATIO, K, workspace, tuning, 0, count)
    return workspace


def check_world(world):
    """Scores against fp64 over the kernel's own queries, maxima of each eight; twins leave the ReLU out or shift keys."""
    workspace = scored(world)
    assert score_faults(world, workspace) == 0, f"{world.fmt.name}: score"
    assert score_faults(world, workspace, relu=False) > 0, f"{world.fmt.name}: no ReLU"
    assert score_faults(world, workspace, shift=1) > 0, f"{world.fmt.name}: another key"
    assert wrong_maxima(world, workspace) == 0, f"{world.fmt.name}: maxima"


def check_small(device="cpu"):
    """Every format of keys."""
    for fmt in INDEX_FORMATS.values():
        check_world(make_world(fmt, FEW, device=device))


def check_many(device="cpu"):
    """More requests, and both types of inputs."""
    for fmt in INDEX_FORMATS.values():
        for dtype in (torch.float32, torch.bfloat16):
            check_world(make_world(fmt, device=device, dtype=dtype))


def check_tilings(device="cpu"):
    """The bytes of a score are those of its request alone; exact values where the interpreter's order is not ours."""
    for fmt in INDEX_FORMATS.values():
        make = exact_world if device == "cpu" else make_world
        world = make(fmt, device=device)
        whole = world.scores(scored(world, IndexTuning(64, 1, 4, 2, 4)))
        for tuning in (IndexTuning(64, 4, 4, 1, 1), IndexTuning(64, 2, 4, 2, 2)):
            scores = world.scores(scored(world, tuning))
            for token, count in enumerate(world.visible.tolist()):
                if count > K:
                    same = torch.equal(whole[token, :count], scores[token, :count])
                    assert same, f"{fmt.name}: token {token}, {tuning}"


def check_many_units(device="cpu"):
    """Several times more units than are counted at once."""
    world = exact_world(FP8_INDEX, device=device)
    whole = world.scores(scored(world))
    with mock.patch.object(index_query_fused, "COUNTED_UNITS", 4), mock.patch.object(index_score_fused, "COUNTED_UNITS", 4):
        scores = world.scores(scored(world, IndexTuning(64, 1, 4, 1, 1)))
    for token, count in enumerate(world.visible.tolist()):
        assert count <= K or torch.equal(whole[token, :count], scores[token, :count]), f"token {token}"


SMALL = (check_small,)
CHECKS = (check_many, check_tilings, check_many_units)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")


@pytest.mark.gpu
def test_without_e4m3_tensor_cores(monkeypatch):
    """As SM80 computes it: keys and queries decoded by integer arithmetic, and multiplied in bf16."""
    world = make_world(FP8_INDEX, device="cuda", heads=64)
    for module in (index_score_fused, index_query_fused):
        monkeypatch.setattr(module, "hardware_casts", lambda device: False)
    assert score_faults(world, scored(world)) == 0


PER_PAGE = 64
POOLS = {"fp8": (FP8_INDEX, "*u8"), "bf16": (BF16_INDEX, "*bf16"), "fp32": (FP32_INDEX, "*fp32")}


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [64, 4096], ids=["decode", "prefill"])
@pytest.mark.parametrize("fmt", POOLS)
def test_machine_code(architecture, tokens, fmt):
    key_format, pool = POOLS[fmt]
    exact = key_format is FP32_INDEX
    arguments = {
        "p_positions": "*i64",
        "first_token": "i32",
        "p_token_rows": "*i64",
        "p_pages": "*i64",
        "page_stride": "i32",
        "num_tokens": "i32",
        "p_first_tiles": "*i32",
        "p_query": pool,
        "p_weights": "*fp32",
        "p_pool": pool,
        "p_scores": "*fp32",
        "score_stride": "i32",
        "p_maxima": "*fp32",
        "maxima_stride": "i32",
    }
    tuning = index_tuning(tokens, 64, exact)
    e4m3 = tl.float8e4nv if architecture >= 89 else tl.bfloat16
    operands = {FP8_INDEX: e4m3, BF16_INDEX: tl.bfloat16, FP32_INDEX: tl.float32}
    constants = {
        "H": 64,
        "D": 128,
        "RATIO": RATIO,
        "PER_PAGE": PER_PAGE,
        "K": 512,
        "UNIT": tuning.unit,
        "BS": tuning.entries,
        "PART": rows_together(PER_PAGE, key_format, tuning.entries),
        "BK": 32 if exact else 128,
        "BU": 256,
        "GROUP": GROUP,
        "FORMAT": store_format(key_format),
        "OPERAND": operands[key_format],
        "CASTS": architecture >= 89,
        "STAGES": tuning.stages,
    }
    assert machine_code(
        index_scores_kernel,
        arguments,
        constants,
        architecture,
        tuning.warps,
        num_stages=tuning.stages,
        maxnreg=tuning.registers,
    )
