"""Decode steps as SGLang replays them, without a GPU: plans, padding, and which rows are written."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dsv4_kernels.sparse_attention.bound import worst
from sglang_dsv4.errors import StalePlanError, UnsupportedError
from tests.cache.driver import FORMATS, make_spec
from tests.plugin.small_server import LONGEST, PAGE, Sequence, SmallServer, alone

pytestmark = pytest.mark.sglang


def contents(cache):
    """Bytes of every tensor of the cache, by layer and kind; and which rows belong to SGLang's padding page and slot."""
    found = {}
    for layer in cache.layers:
        for kind, tensors in layer.memory.storage.tensors().items():
            for number, tensor in enumerate(tensors):
                raw = tensor.contiguous().view(torch.uint8).flatten(1)
                found[layer.layer_id, kind, number] = raw.clone()
    return found


def changed(before, after):
    """Rows that differ."""
    return {
        key: (before[key] != after[key]).any(1).nonzero().flatten().tolist()
        for key in before
        if not torch.equal(before[key], after[key])
    }


def padding_rows(cache, key):
    """Rows of SGLang's padding page and slot; none of packed rows, which lie in groups."""
    layer_id, kind, _ = key
    formats = {"row_pools": cache.spec.rows, "index_keys": cache.spec.index_keys}
    if kind in formats and formats[kind].group_rows > 1:
        return set()
    ratio = cache.spec.layers[layer_id].ratio
    if kind == "row_pools":
        first = cache.storage.num_window_rows
        return {*range(PAGE), *range(first, first + (PAGE // ratio if ratio else 0))}
    return set(range(PAGE // ratio)) if kind == "index_keys" else {0}


def test_capturing_writes_to_the_padding_page_only():
    server = SmallServer(make_spec())
    before = contents(server.cache)
    server.capture([1, 2, 4])
    found = changed(before, contents(server.cache))
    assert found, "the layers ran"
    for key, rows in found.items():
        assert set(rows) <= padding_rows(server.cache, key), key


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_replays_store_the_bytes_of_cold_runs(formats):
    """Other lengths and other requests each time, padding behind them, prefills in between, a slot taken over, a prefix hit."""
    spec = make_spec(formats)
    server = SmallServer(spec)
    one, two = (Sequence(spec, 900, seed, 4, "cpu") for seed in range(2))
    server.capture([4, 1])
    server.assign(1, [3, 5, 7])
    server.assign(2, [9, 10, 11])
    server.step([(1, one, 0, 510), (2, two, 0, 254)])
    for offset in range(6):
        server.replay([(2, two, 254 + offset, 255 + offset), (1, one, 510 + offset, 511 + offset)])
    kept = contents(server.cache)
    server.assign(4, [3, 5, 14])
    server.step([(4, one, 512, 514)])
    server.assign(2, [15, 16])  # another request in slot 2, beside
    server.step([(2, one, 0, 126), (1, one, 516, 519)])
    for offset in range(5):
        server.replay([(slot, one, at + offset, at + offset + 1) for slot, at in ((4, 514), (2, 126), (1, 519))])
    server.replay([(2, one, 131, 132)])
    for slot, length in ((1, 524), (4, 519), (2, 132)):
        assert server.bytes_of(slot, length) == alone(spec, one, length), slot
    assert server.bytes_of(1, 524) != alone(spec, two, 524)
    for key, rows in changed(kept, contents(server.cache)).items():
        padding = padding_rows(server.cache, key)
        if key[1] != "stream_state":
            assert not padding & set(rows), f"{key}: padding was written"
    assert server.backend.steps == {"extend": 3, "decode": 12}


def test_queries_attend_to_their_own_rows_and_padding_to_none():
    spec = make_spec(("fp32", "fp32"))
    server = SmallServer(spec)
    sequence, other = (Sequence(spec, 700, seed, 4, "cpu") for seed in range(2))
    server.capture([4])
    server.assign(1, [3, 5, 7])
    server.assign(2, [9, 10])
    server.step([(1, sequence, 0, 600), (2, other, 0, 5)])
    items = [(1, sequence, 600, 601), (2, other, 5, 6)]
    for layer_id, (out, chosen) in enumerate(server.replay(items)):
        assert not out[2:].any()
        for row, item in enumerate(items):
            mine = None if chosen is None else chosen[row]
            assert worst(out[row], server.expected(layer_id, item, mine)) <= 1, (layer_id, row)
            shorter = (*item[:3], item[3] - 1)
            assert worst(out[row], server.expected(layer_id, shorter, mine)) > 1


def test_a_plan_is_what_the_tables_say():
    spec = make_spec()
    server = SmallServer(spec)
    server.capture([4])
    server.assign(1, [3, 5, 7])
    server.assign(2, [9])
    sequence = Sequence(spec, 700, 0, 4, "cpu")
    server.load_batch([(2, sequence, 255, 256), (1, sequence, 256, 257)])
    step = server.backend.graphs.step(4).step
    assert step.positions.tolist() == [255, 256, -1, -1]
    assert step.token_rows.tolist() == [0, 1, 0, 0]
    assert step.extend_lens.tolist() == [1, 1, 0, 0]
    assert step.seq_lens.tolist() == [256, 257, 1, 1]
    assert step.state_slots.tolist() == [2, 1, 0, 0]
    assert step.history_pages[0, 0] == 9 and step.history_pages[1, :2].tolist() == [3, 5]
    assert step.window_pages[0, 0] == 16 and step.window_pages[1, :2].tolist() == [22, 20]
    assert step.history_pages.shape == (4, LONGEST // PAGE)


def test_another_window_table_is_another_launch():
    server = SmallServer(make_spec())
    server.capture([1])
    server.assign(1, [3])
    items = [(1, Sequence(server.spec, 8, heads=4), 4, 5)]
    step, kept = server.backend.graphs.step(1), server.pool.full_to_swa_index_mapping
    found, launches = [], []
    for shift in (0, 1, 0):
        server.pool.register_mapping(kept if shift == 0 else kept + shift * PAGE)
        server.load_batch(items)
        found.append(int(step.step.window_pages[0, 0]))
        launches.append(len(step.launches))
    assert found == [22, 23, 22]
    assert launches[1] == launches[0] + 1 == launches[2]


def test_an_idle_replay_has_no_real_request():
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    server = SmallServer(make_spec())
    server.capture([2])
    view = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        actual_forward_mode=ForwardMode.IDLE,
        batch_size=2,
        num_padding=1,
        seq_lens=server.buffers.seq_lens,
        seq_lens_cpu=None,
        req_pool_indices=server.buffers.req_pool_indices,
    )
    server.backend.init_forward_metadata_out_graph(view)
    assert server.backend.graphs.step(2).step.extend_lens.tolist() == [0, 0]


def test_what_no_graph_can_hold_is_refused():
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    server = SmallServer(make_spec())
    with pytest.raises(StalePlanError, match="expected init_cuda_graph_state before"):
        server.backend.init_forward_metadata_in_graph(SimpleNamespace(batch_size=1))
    with pytest.raises(UnsupportedError, match="expected one token a request, got 8 tokens of 4"):
        server.backend.init_cuda_graph_state(4, 8)
    server.capture([2])
    verify = SimpleNamespace(forward_mode=ForwardMode.TARGET_VERIFY)
    with pytest.raises(UnsupportedError, match="expected decode steps, got TARGET_VERIFY"):
        server.backend.init_forward_metadata_out_graph(verify)
    server.backend.checks = object()
    with pytest.raises(UnsupportedError, match="--dsv4-check: not possible with CUDA graphs"):
        server.backend.init_cuda_graph_state(2, 2)
    del server.backend.attention.__class__.capture_fault
    with pytest.raises(UnsupportedError, match="with attention eager, because it asks the device"):
        server.backend.init_cuda_graph_state(2, 2)


def test_a_sequence_longer_than_the_graphs_is_refused():
    spec = make_spec()
    server = SmallServer(spec)
    server.capture([1])
    with pytest.raises(StalePlanError, match=f"at most {LONGEST} tokens, got one of 1100"):
        server.load_batch([(1, Sequence(spec, 1100, 0, 4, "cpu"), 1099, 1100)])


def test_the_indexer_waits_for_queries_that_another_stream_makes(monkeypatch):
    done = []
    stream = SimpleNamespace(wait_event=lambda event: done.append(event))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    server = SmallServer(make_spec())
    sequence = Sequence(server.spec, 8, 0, 4, "cpu")
    server.assign(1, [3])
    items = [(1, sequence, 0, 8)]
    batch = server.batch(items, False)
    server.layers.load(items)
    server.backend.init_forward_metadata(batch)
    indexer = server.layers.indexer(1)
    indexer.wq_b = lambda given: (done.append("wq_b"), given)[1:]
    q_lora = server.layers.index_q[:8].flatten(1)
    server.backend.forward_c4_indexer(q_lora, q_lora, indexer, batch, q_lora_ready="event")
    assert done == ["event", "wq_b"]


def test_chosen_entries_are_numbered_as_the_attention_asks(monkeypatch):
    server = SmallServer(make_spec())
    sequence = Sequence(server.spec, 8, 0, 4, "cpu")
    server.assign(1, [3])
    items = [(1, sequence, 0, 8)]
    batch = server.batch(items, False)
    server.layers.load(items)
    server.backend.init_forward_metadata(batch)
    plan, attention = server.pool.step.plan, server.backend.attention
    other = replace(plan.step, num_window_rows=plan.step.num_window_rows + 7)
    monkeypatch.setattr(type(attention), "numbering", property(lambda _: other))
    q_lora = server.layers.index_q[:8].flatten(1)
    chosen = server.layers._index(server.backend, batch, 1, 8, q_lora, None)
    q, weights = server.layers.index_q[:8], server.layers.index_weights[:8]
    physical = server.backend.cache.layers[1].select(plan, q, weights)
    assert torch.equal(chosen, torch.where(physical >= 0, physical + 7, -1)) and chosen.max() > 7
