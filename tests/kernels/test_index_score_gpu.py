"""The fused indexer on a GPU: the checks of `tests.kernels.index_score_checks`, real sizes, casts, and capture."""

import pytest
import torch

from dsv4_kernels.index_score import fused, naive_topk_entries
from dsv4_kernels.index_score.tuning import IndexTuning
from dsv4_kernels.layout import BF16_INDEX, FP8_INDEX, INDEX_FORMATS
from tests.kernels.index_score_checks import CHECKS, score_faults
from tests.kernels.index_world import make_world

pytestmark = pytest.mark.gpu

DECODE = tuple((length, 1) for length in (0, 3, 2047, 2048, 5000, 40_000, 70_001, 9))
MIXED = ((2100, 1), (5000, 4), (2048, 300), (0, 40), (66_000, 33))
TUNINGS = (IndexTuning(64, 1, 4, 4, 4), IndexTuning(64, 2, 4, 3, 2), IndexTuning(128, 2, 4, 3, 2))


def same_scores(world, one, other, k):
    return all(
        torch.equal(world.scores(one)[token, :count], world.scores(other)[token, :count])
        for token, count in enumerate(world.visible.tolist())
        if count > k
    )


@pytest.mark.parametrize("check", CHECKS)
def test_as_interpreted(check):
    CHECKS[check](device="cuda")


@pytest.mark.parametrize("fmt", INDEX_FORMATS.values(), ids=INDEX_FORMATS)
@pytest.mark.parametrize("requests", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(("heads", "k"), [(64, 512), (8, 1024)])
def test_real_sizes(fmt, requests, heads, k):
    """The choice among the kernel's own scores, which do not depend on the tiling or on the pieces of a step."""
    options = {"device": "cuda", "page_tokens": 256, "dtype": torch.bfloat16}
    world = make_world(fmt, requests, heads, **options)
    results = [world.fused(tuning=tuning, k=k) for tuning in TUNINGS]
    out, workspace = results[0]
    chosen = naive_topk_entries(world.scores(workspace), world.visible, k)
    assert torch.equal(out, world.rows_of(chosen))
    for other_out, other in results[1:]:
        assert same_scores(world, workspace, other, k) and torch.equal(out, other_out)
    pieces, _ = world.fused(world.workspace(max_tokens=5, k=k), k=k)
    assert torch.equal(pieces, out)
    again, _ = world.fused(k=k)
    assert torch.equal(again, out), "a second run differs: a race"


def test_without_e4m3_tensor_cores(monkeypatch):
    """As SM80 computes it: keys and queries decoded by integer arithmetic, and multiplied in bf16."""
    world = make_world(FP8_INDEX, device="cuda", heads=64)
    monkeypatch.setattr(fused, "hardware_casts", lambda device: False)
    _, integer = world.fused()
    assert score_faults(world, integer) == 0


def test_a_captured_call_follows_its_inputs():
    first, second = (make_world(BF16_INDEX, device="cuda", seed=seed) for seed in (1, 2))
    expected, workspace = second.fused()
    out = torch.full_like(expected, 7)
    arguments = (first.step, first.q, first.weights, first.pool, first.fmt, first.table, 4, out, workspace)
    fused.select_entries(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused.select_entries(*arguments)
    for name in ("q", "weights", "pool"):
        getattr(first, name).copy_(getattr(second, name))
    for name in ("positions", "token_rows", "history_pages"):
        getattr(first.step, name).copy_(getattr(second.step, name))
    assert not torch.equal(out, expected)
    graph.replay()
    assert torch.equal(out, expected)
