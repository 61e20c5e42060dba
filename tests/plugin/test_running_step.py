"""What the layers of a step leave to each other, and which weights they are bound to."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sglang_dsv4.errors import StalePlanError
from tests.cache.driver import make_spec
from tests.plugin.small_server import Sequence, SmallServer, Unattended, alone

pytestmark = pytest.mark.sglang


@pytest.fixture
def server():
    server = SmallServer(make_spec(), attention=Unattended)
    server.assign(1, [3])
    return server


def store(server, layer_id, kv):
    weights = server.layers.parts[layer_id]["window"].norm.weight
    server.pool.set_swa_key_buffer_radix_fused_norm_rope(layer_id, None, kv, weights, 1e-6, None, None)


def begin(server, sequence, start, end):
    batch = server.batch([(1, sequence, start, end)], False)
    server.layers.load([(1, sequence, start, end)])
    server.backend.init_forward_metadata(batch)
    return batch


def test_a_projection_lives_until_the_next_layer_or_step(server):
    """Another stream may still read it when SGLang has dropped it."""
    sequence = Sequence(server.spec, 8)
    begin(server, sequence, 0, 4)
    held = []
    for layer_id in (0, 1):
        kv = torch.randn(4, 512)
        held.append(weakref.ref(kv))
        store(server, layer_id, kv)
        del kv
        assert held[layer_id]() is not None
    assert held[0]() is None
    begin(server, sequence, 4, 8)
    assert held[1]() is None


def test_a_step_that_cannot_be_planned_leaves_nothing_of_the_one_before(server):
    sequence = Sequence(server.spec, 8)
    begin(server, sequence, 0, 4)
    assert server.pool.step.plan.num_tokens == 4
    batch = server.batch([(1, sequence, 4, 8)], False)
    batch.seq_lens_cpu = torch.tensor([5000])
    with pytest.raises(StalePlanError, match="at most 1024 tokens, got one of 5000"):
        server.backend.init_forward_metadata(batch)
    with pytest.raises(StalePlanError, match="expected init_forward_metadata before the first layer"):
        store(server, 0, torch.randn(4, 512))


def test_chosen_entries_go_to_their_layer_once(server):
    step, rows = server.pool.step, torch.zeros(1, 4)
    step.choose(1, rows)
    assert step.chosen(1) is rows
    assert step.chosen(1) is None
    step.choose(1, rows)
    assert step.chosen(3) is None
    step.choose(1, rows)
    begin(server, Sequence(server.spec, 8), 0, 4)
    assert step.chosen(1) is None


@pytest.mark.parametrize(
    ("part", "name"), [("window", "norm"), ("main", "norm"), ("main", "ape"), ("index", "norm"), ("index", "ape")]
)
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_new_weights_are_used_from_the_next_step_on(server, part, name, how):
    """Steps with other weights, then all of the sequence anew with the first ones: as if these had always been there."""
    sequence, weights = Sequence(server.spec, 140), server.layers.parts[1][part]
    holder, field = (weights.norm, "weight") if name == "norm" else (weights, "ape")
    first = getattr(holder, field)
    setattr(holder, field, 3 * first)
    server.step([(1, sequence, 0, 140)])
    assert server.bytes_of(1, 140) != alone(server.spec, sequence, 140)
    if how == "replaced":
        setattr(holder, field, first)
    else:
        getattr(holder, field).copy_(first)
    server.step([(1, sequence, 0, 140)])
    assert server.bytes_of(1, 140) == alone(server.spec, sequence, 140)


@pytest.mark.parametrize("where", ["never", "eager", "always"])
def test_main_and_indexer_store_the_same_bytes_in_one_launch(monkeypatch, where):
    from sglang_dsv4.plugin.serve import backend

    monkeypatch.setattr(backend, "ONE_LAUNCH", where)
    spec = make_spec()
    server, sequence = SmallServer(spec), Sequence(spec, 300)
    server.assign(1, [3, 5])
    calls = []
    layer = server.cache.layers[1]
    append = layer.append
    layer.append = lambda plan, **parts: (calls.append(sorted(parts)), append(plan, **parts))
    for start, end in ((0, 256), (256, 263), (263, 264)):
        server.step([(1, sequence, start, end)])
    server.capture([1])
    server.replay([(1, sequence, 264, 265)])
    apart, together = [["window"], ["index"], ["main"]], [["window"], ["index", "main"]]
    eager, graph = (apart if where in ways else together for ways in (("never",), ("never", "eager")))
    assert calls == [*apart, *eager, *eager, *graph * 3]  # twice before the capture, then the replay
    assert server.bytes_of(1, 265) == alone(spec, sequence, 265)


def test_a_main_compressor_is_left_out_only_where_it_was_early(server):
    """A second call for one layer and step is a mistake of the caller; another step's call is none."""
    sequence = Sequence(server.spec, 12)
    for start in (0, 4):
        server.step([(1, sequence, start, start + 4)])
    batch = begin(server, sequence, 8, 12)
    x, main, index = server.layers.index_q[:4], server.layers.parts[1]["main"], server.layers.parts[1]["index"]
    server.backend.forward_indexer_compressor(x, batch, 1, index)
    server.backend.forward_core_compressor(x, batch, 1, main)
    with pytest.raises(StalePlanError, match="layer 1 main: expected once per step"):
        server.backend.forward_core_compressor(x, batch, 1, main)
    hca = server.layers.parts[2]["main"]
    server.backend.forward_core_compressor(x, batch, 2, hca)
    with pytest.raises(StalePlanError, match="layer 2 main: expected once per step"):
        server.backend.forward_core_compressor(x, batch, 2, hca)


def test_the_main_compressor_may_come_before_the_indexer(server):
    """As SGLang calls where ``skip_compressor`` is set."""
    sequence = Sequence(server.spec, 8)
    server.step([(1, sequence, 0, 4)])
    batch = begin(server, sequence, 4, 8)
    x, parts = server.layers.index_q[:4], server.layers.parts[1]
    server.backend.forward_core_compressor(x, batch, 1, parts["main"])
    server.backend.forward_indexer_compressor(x, batch, 1, parts["index"])
    store(server, 1, server.layers.parts[1]["window"].given[:4])
    assert server.bytes_of(1, 8)[1, "index keys"] == alone(server.spec, sequence, 8)[1, "index keys"]
    assert server.bytes_of(1, 8)[1, "entries"] == alone(server.spec, sequence, 8)[1, "entries"]


@pytest.mark.parametrize("columns", [16, 8])
def test_entries_go_into_lists_of_full_width_only(server, monkeypatch, columns):
    """A kernel is compiled for each width; a graph has one."""
    sequence, place = Sequence(server.spec, 140), torch.full((10, columns), -7, dtype=torch.int32)
    server.step([(1, sequence, 0, 130)])
    batch = begin(server, sequence, 130, 140)
    monkeypatch.setattr(Unattended, "selected_buffer", lambda attention, layer: place)
    chosen = server.layers._index(server.backend, batch, 1, 10, server.layers.index_q[:10].flatten(1), None)
    assert (chosen is place) == (columns == server.spec.index_topk)
    server.pool.step._begun = (replace(server.pool.step.plan), SimpleNamespace(selected_buffer=lambda _: place, numbering=None))
    server.backend.forward_c4_indexer(
        server.layers.index_q[:10], server.layers.index_q[:10].flatten(1), server.layers.indexer(1), batch, skip_compressor=True
    )
    assert server.pool.step.chosen(1) is place
