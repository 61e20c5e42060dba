"""Which steps DeepGEMM scores, and what it is given."""

from dataclasses import replace

import pytest
import torch

from dsv4_kernels.layout import BF16_INDEX, FP8_INDEX
from dsv4_kernels.row_codec import naive_load_rows
from sglang_dsv4.cache import ExternalKVCache, long_scores, triton_kernels
from sglang_dsv4.cache.storage import Capacity
from tests.cache.driver import make_spec
from tests.cache.long_scores_checks import CHECKS, long_world
from tests.kernels.index_world import RATIO, K
from tests.kernels.interpreting import interpreted


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(check):
    assert interpreted("tests.cache.long_scores_checks")[check] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check):
    CHECKS[check](device="cuda")


def test_long_prefills_of_one_request_are_taken(monkeypatch):
    world = long_world()
    step, most = world.step, world.max_entries
    assert not long_scores.is_worthwhile(step, 64, RATIO, K), "33 tokens are few"
    monkeypatch.setattr(long_scores, "FEWEST_TOKENS", 32)
    assert long_scores.is_worthwhile(step, 64, RATIO, K)
    two = replace(step, seq_lens=step.seq_lens.repeat(2))
    pages = replace(step, page_tokens=128)
    for other, heads, k in ((step, 32, K), (step, 64, most), (two, 64, K), (pages, 64, K)):
        assert not long_scores.is_worthwhile(other, heads, RATIO, k)


def test_keys_lie_in_a_row_in_the_pages_order():
    world = long_world()
    pages = world.step.history_pages[0]
    keys, scales = long_scores.gather_keys(world.pool, pages)
    assert keys.is_contiguous() and scales.is_contiguous() and len(keys) == world.max_entries
    count = int(world.visible.max())
    entries = torch.arange(count)
    slots = world.step.index_slots(torch.zeros_like(entries), entries, RATIO)
    expected = naive_load_rows(world.pool, slots, FP8_INDEX)
    assert torch.equal(keys[:count].float() * scales[:count].unsqueeze(1), expected)
    keys, scales = long_scores.gather_keys(world.pool, pages.roll(1))
    assert not torch.equal(keys[:count].float() * scales[:count].unsqueeze(1), expected)


def test_there_is_nothing_to_load_on_a_cpu_or_for_other_keys():
    assert not long_scores.has_deep_gemm(torch.device("cpu"), FP8_INDEX)
    assert not long_scores.has_deep_gemm(torch.device("cuda"), BF16_INDEX)


@pytest.mark.parametrize("installed", [True, False])
def test_the_operations_ask_it_where_it_is_installed(monkeypatch, installed):
    done = []
    monkeypatch.setattr(triton_kernels, "has_deep_gemm", lambda device, keys: installed)
    monkeypatch.setattr(triton_kernels, "is_worthwhile", lambda step, heads, ratio, k: heads == 8)
    monkeypatch.setattr(triton_kernels, "select_long", lambda *_: done.append("DeepGEMM"))
    monkeypatch.setattr(triton_kernels, "select_entries", lambda *_, **__: done.append("ours"))
    ops = triton_kernels.TritonKernels(make_spec(("fp8_584", "fp8")), Capacity(4, 4, 2, 1024), torch.device("cpu"))
    assert ("DeepGEMM" in ops.index_scores) == installed
    plan = type("Plan", (), {"num_tokens": 3, "step": None})
    cache = ExternalKVCache(make_spec(("fp8_584", "fp8")), Capacity(4, 4, 2, 1024))
    memory = cache.layers[1].memory
    for heads in (8, 4):
        ops._index = None
        ops.select(memory, plan, torch.zeros(3, heads, 128), torch.zeros(3, heads), None, None)
    assert done == (["DeepGEMM", "ours"] if installed else ["ours", "ours"])
