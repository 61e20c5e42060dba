"""Which attention is chosen, and what is refused, by device, format and packages."""

import pytest
import torch

from sglang_dsv4.attention import Capabilities, EagerAttention, choose, choose_attention, make_attention
from sglang_dsv4.attention.device import Device, device_of
from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.errors import UnsupportedError
from tests.cache.driver import make_spec

CPU = device_of(torch.device("cpu"))


def capabilities(sm=None, row_format="bf16", heads=64, flashinfer="0.6.18", flashmla=None):
    device = CPU if sm is None else Device(torch.device("cuda:0"), divmod(sm, 10), 132)
    return Capabilities(device, row_format, heads, flashinfer, flashmla)


@pytest.fixture
def by_name(monkeypatch):
    """Names instead of classes: neither package is installed here."""
    monkeypatch.setattr(choose, "_load", lambda name: name)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "eager"),
        ({"sm": 75}, "eager"),
        ({"sm": 80}, "flashinfer"),
        ({"sm": 90}, "flashinfer"),
        ({"sm": 120, "row_format": "fp8_584"}, "flashinfer"),
        ({"sm": 90, "row_format": "fp8_584"}, "flashinfer"),
        ({"sm": 90, "row_format": "fp8_584", "flashmla": "1.0.0"}, "flashmla"),
        ({"sm": 90, "row_format": "fp8_584", "flashmla": "1.0.0", "heads": 32}, "flashinfer"),
        ({"sm": 90, "flashmla": "1.0.0"}, "flashinfer"),
        ({"sm": 90, "row_format": "fp32", "flashmla": "1.0.0"}, "eager"),
        ({"sm": 90, "flashinfer": None}, "eager"),
        ({"sm": 90, "flashinfer": "0.6.15"}, "eager"),
        ({"sm": 90, "flashinfer": "0.7.2.post1"}, "flashinfer"),
        ({"sm": 90, "flashinfer": "0.6.19rc1"}, "flashinfer"),
        ({"flashinfer": "0.6.19rc1"}, "eager"),
        ({"sm": 90, "flashinfer": "0.6.18rc1"}, "eager"),
        ({"sm": 90, "flashinfer": "0.6.18+cu130"}, "flashinfer"),
        ({"sm": 90, "flashinfer": "nightly"}, "eager"),
    ],
    ids=str,
)
def test_the_fastest_possible_is_chosen(by_name, options, expected):
    chosen, reason = choose_attention(None, capabilities(**options))
    assert chosen == expected
    assert reason.startswith("the fastest for ")
    for name in choose.NAMES:  # whatever is faster and was passed over is explained
        passed = ["flashmla", "flashinfer", "eager"].index(name) < ["flashmla", "flashinfer", "eager"].index(expected)
        assert (f"{name}: expected" in reason) == passed


@pytest.mark.parametrize(
    ("name", "options", "fault"),
    [
        ("flashinfer", {}, "attention flashinfer: expected a CUDA device of SM80 or later, got cpu"),
        ("flashinfer", {"sm": 75}, "attention flashinfer: expected a CUDA device of SM80 or later, got cuda:0 (SM75)"),
        ("flashinfer", {"sm": 90, "flashinfer": None}, "expected the package flashinfer-python, 0.6.18 or later, got none"),
        ("flashinfer", {"sm": 90, "flashinfer": "0.6.17"}, "expected flashinfer-python 0.6.18 or later, got 0.6.17"),
        ("flashinfer", {"sm": 90, "row_format": "fp32"}, "expected bf16 or fp8_584 rows, got fp32"),
        ("flashinfer", {"sm": 90, "heads": 256}, "expected 1 .. 128 query heads, got 256"),
        ("flashmla", {"sm": 90}, "attention flashmla: expected the package sgl-flash-mla, got none"),
        ("flashmla", {"sm": 100, "flashmla": "1.0.0"}, "expected a CUDA device of SM90, got cuda:0 (SM100)"),
        ("flashmla", {"sm": 90, "flashmla": "1.0.0"}, "expected fp8_584 rows, got bf16"),
        (
            "flashmla",
            {"sm": 90, "flashmla": "1.0.0", "row_format": "fp8_584", "heads": 8},
            "expected 64 or 128 query heads, got 8",
        ),
    ],
)
def test_the_impossible_is_refused_with_a_reason(by_name, name, options, fault):
    with pytest.raises(UnsupportedError) as refusal:
        choose_attention(name, capabilities(**options))
    assert fault in str(refusal.value)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="attention: expected one of .*'eager'.*, got 'triton'"):
        choose_attention("triton", capabilities())


def test_eager_is_always_possible():
    assert choose_attention("eager", capabilities(sm=90)) == (EagerAttention, "asked for")


def test_a_cpu_gets_eager_attention():
    cache = CompressedKVCache(make_spec(), num_pages=1, max_requests=1)
    attention, reason = make_attention(None, cache, 4)
    assert isinstance(attention, EagerAttention) and "flashinfer: expected" in reason
    with pytest.raises(UnsupportedError, match="attention flashinfer: "):
        make_attention("flashinfer", cache, 4)


def test_device_of_a_cpu():
    assert (CPU.capability, CPU.num_sms, str(CPU)) == (None, 0, "cpu")
