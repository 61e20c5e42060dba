"""A layer: its constants, checked once by `bind` and replaced between steps; its inputs; no graph of gradients."""

from dataclasses import replace

import pytest
import torch

from sglang_dsv4.cache import CompressedKVCache, CompressorWeights, NormWeights
from tests.cache.driver import append_all, feed, make_spec, random_sequence, reachable_bytes

NORM = NormWeights(torch.ones(512), 1e-6)
CSA = CompressorWeights(torch.zeros(8, 512), torch.ones(512), 1e-6)
INDEX = CompressorWeights(torch.zeros(8, 128), torch.ones(128), 1e-6)
HCA = CompressorWeights(torch.zeros(128, 512), torch.ones(512), 1e-6)


@pytest.fixture
def cache():
    return CompressedKVCache(make_spec(), num_pages=2, max_requests=2)


@pytest.mark.parametrize(
    ("layer_id", "weights", "error", "message"),
    [
        (0, {"window": CSA}, TypeError, "layer 0 window: expected NormWeights, got CompressorWeights"),
        (1, {"main": NORM}, TypeError, "layer 1 main: expected CompressorWeights, got NormWeights"),
        (1, {"window": torch.ones(512)}, TypeError, "layer 1 window: expected NormWeights, got Tensor"),
        (0, {"main": CSA}, ValueError, r"layer 0 \(window\): expected parts window, got main"),
        (2, {"index": INDEX}, ValueError, r"layer 2 \(hca\): expected parts window, main, got index"),
        (1, {"main": HCA}, ValueError, r"layer 1 main slot_bias: expected shape \(8, 512\), got \(128, 512\)"),
        (1, {"index": CSA}, ValueError, r"layer 1 index norm_weight: expected shape \(128,\), got \(512,\)"),
        (0, {"window": NormWeights(torch.ones(512).half(), 1e-6)}, TypeError, "expected torch.float32 or torch.bfloat16"),
        (1, {"main": replace(CSA, slot_bias=CSA.slot_bias.bfloat16())}, TypeError, "slot_bias: expected torch.float32, got"),
        (0, {"window": NormWeights([1.0] * 512, 1e-6)}, TypeError, "norm_weight: expected a tensor, got list"),
        (0, {"window": NormWeights(torch.ones(512), None)}, TypeError, "layer 0 window eps: expected a number, got NoneType"),
        (0, {"window": NormWeights(torch.ones(512), True)}, TypeError, "layer 0 window eps: expected a number, got bool"),
        *(
            (1, {"main": replace(CSA, eps=eps)}, ValueError, f"layer 1 main eps: expected a finite number above 0, got {eps}")
            for eps in (float("nan"), float("inf"), -1e-6, 0.0)
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(cache, layer_id, weights, error, message):
    with pytest.raises(error, match=message):
        cache.layers[layer_id].bind(**weights)


def test_one_wrong_part_binds_none(cache):
    layer, plan = cache.layers[1], cache.plan([(cache.open(), 1)])
    with pytest.raises(TypeError):
        layer.bind(window=NORM, main=CSA, index=NORM)
    with pytest.raises(ValueError, match="layer 1 window: expected weights by `bind` before the first append, got none"):
        layer.append(plan, window=torch.zeros(1, 512))
    assert not plan.started


@pytest.mark.parametrize("given", [NORM, CSA, [0.0] * 512, None])
def test_a_step_takes_plain_tensors(cache, given):
    """An object in the place of a projection is refused, and one that is missing is missed."""
    layer = cache.layers[0]
    layer.bind(window=NORM)
    plan = cache.plan([(cache.open(), 1)])
    if given is None:
        layer.append(plan, window=given)
        assert not plan.started
        return
    with pytest.raises(TypeError, match=f"layer 0 window: expected a tensor, got {type(given).__name__}"):
        layer.append(plan, window=given)
    assert not plan.started


def test_weights_are_replaced_between_steps(cache):
    """What another binding writes is what a cache that had it from the start writes; in-place changes count as well."""
    spec, sequence = cache.spec, random_sequence(make_spec(), 9)
    other = CompressedKVCache(spec, num_pages=2, max_requests=1)
    requests = cache.open(), other.open()
    feed(cache, [(requests[0], sequence, 5)])
    feed(other, [(requests[1], sequence, 5)])
    before = reachable_bytes(cache, requests[0])
    changed = CompressorWeights(CSA.slot_bias + 1, CSA.norm_weight * 2, 1e-5)
    shared = CompressorWeights(CSA.slot_bias.clone(), CSA.norm_weight.clone(), 1e-5)
    for mine, weights in ((cache, changed), (other, shared)):
        mine.layers[1].bind(main=weights)
    shared.slot_bias.add_(1)
    shared.norm_weight.mul_(2)
    for mine, request in zip((cache, other), requests, strict=True):
        plan = mine.plan([(request, 4)])
        for layer in mine.layers:
            layer.append(plan, **{p.value: sequence.cut(layer.layer_id, p.value, 5, 9).values for p in layer.parts})
        mine.commit(plan)
    found = reachable_bytes(cache, requests[0])
    assert found == reachable_bytes(other, requests[1])
    assert found[1, "entries"][: len(before[1, "entries"])] == before[1, "entries"]
    cold = CompressedKVCache(spec, num_pages=2, max_requests=1)
    request = cold.open()
    feed(cold, [(request, sequence, 9)])
    assert found[1, "entries"] != reachable_bytes(cold, request)[1, "entries"]  # the twin: with the first weights


def test_gradients_are_never_recorded(cache):
    """Parameters and projections that require gradients leave pools that do not, and the bytes are the same."""
    sequence = random_sequence(cache.spec, 140)
    expected = CompressedKVCache(cache.spec, num_pages=2, max_requests=1)
    request, plain = cache.open(), expected.open()
    feed(expected, [(plain, sequence, 140)])
    plan = cache.plan([(request, 140)])
    for layer in cache.layers:
        for part in layer.parts:
            given = sequence.parts[layer.layer_id][part.value]
            fields = {
                name: torch.nn.Parameter(v) if isinstance(v, torch.Tensor) else v for name, v in vars(given.weights).items()
            }
            layer.bind(**{part.value: type(given.weights)(**fields)})
            layer.append(plan, **{part.value: given.values.clone().requires_grad_()})
    q = torch.randn(140, 4, 128, requires_grad=True)
    chosen = cache.layers[1].select(plan, q, torch.rand(140, 4, requires_grad=True))
    cache.commit(plan)
    memory = [tensor for layer in cache.storage.layers for tensors in layer.tensors().values() for tensor in tensors]
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in [*memory, chosen])
    assert reachable_bytes(cache, request) == reachable_bytes(expected, plain)


@pytest.mark.parametrize(
    ("layer_id", "q", "weights", "error", "message"),
    [
        (
            1,
            torch.zeros(2, 4, 128),
            torch.ones(2, 4, dtype=torch.int64),
            TypeError,
            "layer 1 index_weights: expected torch.float32",
        ),
        (1, torch.zeros(2, 4, 128), [[1.0] * 4] * 2, TypeError, "layer 1 index_weights: expected a tensor, got list"),
        (1, torch.zeros(2, 4, 128), torch.tensor(1.0), ValueError, r"layer 1 index_weights: expected shape \(2, 0\), got \(\)"),
        (1, torch.zeros(2, 4, 64), torch.ones(2, 4), ValueError, r"layer 1 index_q: expected shape \(2, 4, 128\), got"),
        (1, torch.zeros(3, 4, 128), torch.ones(2, 4), ValueError, r"layer 1 index_q: expected shape \(2, 4, 128\), got"),
        (2, torch.zeros(2, 4, 128), torch.ones(2, 4), ValueError, "layer 2: expected a CSA layer, got 'hca'"),
    ],
)
def test_a_selection_from_the_wrong_tensors(cache, layer_id, q, weights, error, message):
    plan = cache.plan([(cache.open(), 2)])
    append_all(cache, plan, [(random_sequence(cache.spec, 2), 0, 2)])
    with pytest.raises(error, match=message):
        cache.layers[layer_id].select(plan, q, weights)
