"""FlashMLA on an SM90 against fp64: packed rows in decode, decoded or bf16 rows in prefill. Elsewhere: that it is refused."""

import importlib
from unittest import mock

import pytest
import torch

from dsv4_kernels.sparse_attention.bound import worst
from sglang_dsv4.attention import EagerAttention, FixedShape, choose_attention, find_capabilities
from sglang_dsv4.check.attention_work import AttentionCase, AttentionWork
from sglang_dsv4.errors import UnsupportedError
from tests.attention.flashmla_checks import CHECKS
from tests.attention.test_flashinfer_gpu import STARTS, errors, expect, make, make_work, pad, run

pytestmark = [pytest.mark.gpu, pytest.mark.flashinfer]

FIXED = FixedShape(12, 8192)


def hopper():
    return torch.cuda.get_device_capability() == (9, 0)


def make_flashmla(work, fixed=None):
    attention = importlib.import_module("sglang_dsv4.attention.flashmla").FlashMLAAttention
    return attention(work.cache, work.case.heads, fixed=fixed)


@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_packed_rows_match_fp64(kind, heads):
    work = make_work(kind, heads, "fp8_584")
    if not hopper():
        with pytest.raises(UnsupportedError, match="attention flashmla: "):
            choose_attention("flashmla", find_capabilities(work.cache.device, work.cache.spec.row_format, heads))
        return
    attention = make_flashmla(work)
    attention.begin(work.plan, work.lengths)
    for layer_id in (1, 0):
        assert max(errors(run(attention, work, layer_id), work, layer_id)) <= 1


def test_a_pool_beyond_32_bits():
    if not hopper():
        return
    case = AttentionCase("csa", ((1 << 20) - 1,) * 30, (1,) * 30)
    work = AttentionWork(case, 1, "fp8_584", torch.device("cuda"))
    pool, fmt = work.cache.layers[0].pool, work.cache.spec.rows
    assert pool.numel() * pool.element_size() > 1 << 32
    work.q, work.selected = work.q * 2, work.selected * 2
    farthest = int(work.selected[0].max()) // fmt.group_rows * fmt.group_bytes
    assert farthest > 1 << 32
    attention = make_flashmla(work)
    attention.begin(work.plan, work.lengths)
    assert max(errors(run(attention, work, 0), work, 0)) <= 1


@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_graph_replays_with_other_lengths(kind):
    if not hopper():
        return
    work = make_work(kind, row_format="fp8_584")
    plan, q, selected = pad(work, FIXED, 3.0)
    attention = make_flashmla(work, FIXED)

    def attend():
        attention.begin(plan)
        return [attention.run(work.cache.layers[i], q[i], work.sink, selected[i], undo_rope=True) for i in range(2)]

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend()
    for kept in (list(range(len(STARTS))), [8, 0, 3]):
        rest = [i for i in range(FIXED.num_tokens) if i not in kept]
        fresh, _, _ = pad(work, FIXED, 3.0)
        positions = fresh.step.positions.clone()
        positions[rest] = -1
        plan.step.positions.copy_(positions)
        for tensor in found:
            tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for layer_id in range(2):
            assert not found[layer_id][rest].any()
            assert max(worst(found[layer_id][i], expect(work, layer_id, i)) for i in kept) <= 1


@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_prefill_of_bf16_rows(kind):
    work = make_work(kind, starts=(1000, 0, 700), extends=(150, 401, 1))
    if not hopper():
        with pytest.raises(UnsupportedError, match="prefill flashmla: "):
            make(work, prefill="flashmla")
        return
    attention = make(work, prefill="flashmla")
    attention.begin(work.plan, work.lengths)
    found = run(attention, work, 1)
    chunk = attention.chunks[kind][0]
    assert isinstance(chunk.schedule, torch.Tensor), "FlashInfer attended"
    assert max(errors(found, work, 1)) <= 1
    if kind == "csa":
        place = attention.selected_buffer(work.cache.layers[1])
        wanted = work.kind.num_entries(work.plan.step.positions).unsqueeze(1)
        valid = torch.arange(place.shape[1], device=place.device) < wanted
        place.copy_(torch.where(valid, work.selected[1][:, : place.shape[1]], place))
        assert torch.equal(attention.run(work.cache.layers[1], work.q[1], work.sink, place, undo_rope=True), found)


@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_prefill_kernel_in_a_graph_with_padding(kind):
    if not hopper():
        return
    fixed = FixedShape(80, 8192)
    work = make_work(kind, starts=tuple(range(0, 7000, 100)))
    plan, q, selected = pad(work, fixed, 3.0)
    attention = make(work, fixed=fixed, prefill="flashmla")

    def attend():
        attention.begin(plan)
        return attention.run(work.cache.layers[0], q[0], work.sink, selected[0], undo_rope=True)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend()
    assert isinstance(attention.chunks[kind][0].schedule, torch.Tensor), "FlashInfer attended"
    found.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    count = work.case.num_tokens
    assert not found[count:].any()
    assert max(worst(found[i], expect(work, 0, i)) for i in range(count)) <= 1


def test_what_is_chosen():
    for row_format in ("bf16", "fp8_584"):
        work = make_work("csa", row_format=row_format)
        chosen, reason = choose_attention(None, find_capabilities(work.cache.device, work.cache.spec.row_format, 64))
        expected = "flashmla" if hopper() and row_format == "fp8_584" else "flashinfer"
        assert chosen.name == expected and f"the fastest for {row_format} rows on cuda" in reason


@pytest.mark.parametrize("check", CHECKS)
def test_as_on_a_model_of_the_kernels(check):
    """Long steps over rows decoded once, short ones over packed rows, and what a graph holds."""
    if hopper():
        CHECKS[check](device="cuda")


@pytest.mark.parametrize(("kind", "topk"), [("window", 512), ("csa", 1024), ("hca", 512)])
def test_a_long_step_behind_a_long_prefix(kind, topk):
    """128 heads: as eager attention has it, and as the decode kernel over packed rows."""
    if not hopper():
        return
    starts, extends = (131_000, 40_001, 0), (1900, 150, 400)
    work = make_work(kind, 128, "fp8_584", starts=starts, extends=extends, topk=topk)
    attention, packed = make_flashmla(work), make_flashmla(work)
    attention.begin(work.plan, work.lengths)
    module = importlib.import_module("sglang_dsv4.attention.flashmla")
    with mock.patch.object(module, "choose_decoded", lambda *_: None):
        packed.begin(work.plan, work.lengths)
    assert attention.numbering is not None and packed.numbering is None
    found, other = run(attention, work, 1), run(packed, work, 1)
    eager = EagerAttention(work.cache)
    eager.begin(work.plan)
    expected = eager.run(work.cache.layers[1], work.q[1], work.sink, work.selected[1], undo_rope=True)
    for query in (0, 71, 72, 1899, 1900, 2048, 2049, 2050, 2449):
        exact = expect(work, 1, query)
        for name, out in {"decoded": found, "packed": other, "eager": expected}.items():
            assert worst(out[query], exact) <= 1, (name, query)
        # Each is as far from the exact value as is allowed, at most, and so at most twice that from another.
        for out in (other, expected):
            assert ((found[query] - out[query]).double().abs() <= 2 * exact.allowed).all(), query
