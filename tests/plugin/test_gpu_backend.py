"""The backend on a GPU: graphs and steps without them, next to cold runs and to fp64, with SGLang's streams and padding."""

import pytest
import torch

from dsv4_kernels.sparse_attention.bound import worst
from sglang_dsv4.attention import decoded_prefill
from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.errors import CacheInvariantError
from tests.cache.driver import feed, make_spec, reachable_bytes
from tests.plugin.small_server import Sequence, SmallServer, make_pool

pytestmark = [pytest.mark.gpu, pytest.mark.sglang]

FORMATS = [("bf16", "bf16"), ("fp8_584", "fp8")]
HEADS = 64


def cold(spec, sequence, length):
    cache = CompressedKVCache(spec, num_pages=8, max_requests=1, device="cuda")
    request = cache.open()
    feed(cache, [(request, sequence.inputs, length)])
    return reachable_bytes(cache, request)


def make_server(spec):
    server = SmallServer(spec, "cuda", HEADS)
    assert server.cache.kernels.name == "triton" and server.backend.attention.name != "eager"
    server.assign(1, [3, 5, 7])
    server.assign(2, [9, 10, 11])
    server.assign(3, [15, 16, 17])
    return server


def script(one, two, three):
    """Steps of all kinds: (decode, items)."""
    yield False, [(1, one, 0, 510), (2, two, 0, 250)]
    yield (False, [(1, one, 510, 512), (3, three, 0, 130), (2, two, 250, 251)])  # a chunk, a prompt, and a decoding request
    for at in range(12):
        yield True, [(2, two, 251 + at, 252 + at), (1, one, 512 + at, 513 + at)]
    yield True, [(3, three, 130, 131)]
    yield False, [(3, three, 131, 256)]
    for at in range(6):
        items = [(3, three, 256), (1, one, 524), (2, two, 263)]
        yield True, [(slot, sequence, n + at, n + at + 1) for slot, sequence, n in items]


def check_values(server, items, found):
    """Attention against fp64 over the rows that each query should list."""
    for layer_id, (out, chosen) in enumerate(found):
        assert not out[len(items) :].any(), "a query of padding attended"
        for row, item in enumerate(items):
            mine = None if chosen is None else chosen[row]
            assert worst(out[row], server.expected(layer_id, item, mine)) <= 1, (layer_id, item)


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_graphs_store_what_steps_without_them_store(formats):
    spec = make_spec(formats)
    sequences = [Sequence(spec, 900, seed, HEADS, "cuda") for seed in range(3)]
    captured, plain = make_server(spec), make_server(spec)
    captured.capture([4, 2, 1])
    ends = {}
    for decode, items in script(*sequences):
        found = captured.replay(items) if decode else captured.step(items)
        expected = plain.step(items, decode)
        torch.cuda.synchronize()
        if decode:
            check_values(captured, items, found)
            check_values(plain, items, expected)
            for (_, ours), (_, theirs) in zip(found, expected, strict=True):
                for row, item in enumerate(items if ours is not None else ()):
                    same = torch.equal(captured.entries(item, ours[row]), captured.entries(item, theirs[row]))
                    assert same, f"other entries in slot {item[0]} at {item[3]}"
        ends |= {slot: (sequence, end) for slot, sequence, _, end in items}
    for slot, (sequence, end) in ends.items():
        assert captured.bytes_of(slot, end) == cold(spec, sequence, end), slot
        assert plain.bytes_of(slot, end) == cold(spec, sequence, end), slot
    assert captured.bytes_of(1, ends[1][1]) != cold(spec, sequences[1], ends[1][1])
    assert captured.backend.attention_bytes() > plain.backend.attention_bytes() > 0


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_long_prefills_attend_to_the_rows_that_they_should(formats, monkeypatch):
    """The last token of each request; on Hopper's packed rows the chosen ones are numbered for decoded rows."""
    monkeypatch.setattr(decoded_prefill, "FEWEST_TOKENS", 256)
    server = make_server(make_spec(formats))
    one, two = (Sequence(server.spec, 900, seed, HEADS, "cuda") for seed in range(2))
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for items in ([(1, one, 0, 383), (2, two, 0, 250)], [(2, two, 250, 251), (1, one, 383, 700)]):
        found, count = server.step(items), sum(end - start for _, _, start, end in items)
        plan, layers = server.pool.step.plan, server.layers
        numbered = server.backend.attention.numbering is not None
        assert numbered == (hopper and server.backend.attention.name == "flashmla")
        given = plan, layers.index_q[:count], layers.index_weights[:count]
        physical = server.cache.layers[1].select(*given)
        last = -1
        for item in items:
            last += item[3] - item[2]
            for layer_id, (out, chosen) in enumerate(found):
                mine = None if chosen is None else physical[last]
                assert worst(out[last], server.expected(layer_id, item, mine)) <= 1, item
            if item[3] - item[2] > 200:  # the twin: the entries of a token long before
                other = server.expected(1, item, physical[last - 150])
                assert worst(found[1][0][last], other) > 1, item


def test_a_prefix_hit_in_a_slot_that_another_request_used():
    spec = make_spec()
    one, two = (Sequence(spec, 900, seed, HEADS, "cuda") for seed in range(2))
    server = make_server(spec)
    server.capture([2])
    server.step([(1, one, 0, 600), (2, two, 0, 303)])
    server.assign(2, [3, 5, 12])
    server.step([(2, one, 512, 515)])
    for at in range(14):
        server.replay([(2, one, 515 + at, 516 + at), (1, one, 600 + at, 601 + at)])
    assert server.bytes_of(2, 529) == cold(spec, one, 529)
    assert server.bytes_of(1, 614) == cold(spec, one, 614)


def choices(wait):
    """The CSA layer's choices over some replays, with and without waiting for the queries' input; and the right ones."""
    spec = make_spec()
    sequence = Sequence(spec, 900, 0, HEADS, "cuda")
    captured, plain = make_server(spec), make_server(spec)
    captured.capture([1], wait=wait)
    found = []
    for server in (captured, plain):
        server.step([(1, sequence, 0, 600)])
    for at in range(600, 608):
        item = (1, sequence, at, at + 1)
        ours = captured.replay([item])[1][1][0]
        theirs = plain.step([item], decode=True)[1][1][0]
        found.append(torch.equal(captured.entries(item, ours), captured.entries(item, theirs)))
    return found


def test_the_indexer_waits_for_its_queries():
    assert all(choices(wait=True))
    assert not all(choices(wait=False)), "the test does not see a race"


def test_no_step_waits_for_the_device():
    spec = make_spec()
    sequence = Sequence(spec, 900, 0, HEADS, "cuda")
    server = make_server(spec)
    server.capture([2])
    items = [[(1, sequence, at, at + 1)] for at in range(600, 603)]
    server.step([(1, sequence, 0, 600)])
    server.step(items[0], decode=True)
    server.replay(items[1])
    prompt = [(2, sequence, 0, 300)]
    server.step(prompt)
    view = server.view(items[2])
    batch = server.batch(prompt, False)
    server.layers.load(prompt)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        server.backend.init_forward_metadata_out_graph(view)
        server.graphs[2]()
        server.backend.init_forward_metadata(batch)
        server.layers.run(server.backend, batch, 300)
        with pytest.raises(RuntimeError, match="synchronizing"):
            view.seq_lens.max().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def requested_bytes():
    """What torch was asked for on this device, without its rounding."""
    torch.cuda.init()
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_the_pool_takes_the_bytes_that_the_budget_counted(formats):
    from sglang_dsv4.plugin.serve.budget import shape_of
    from tests.plugin.small_server import MODEL, PAGE, PAGES, REQUESTS

    spec = make_spec(formats)
    before = requested_bytes()
    pool = make_pool(spec, "cuda")
    taken = requested_bytes() - before - pool.full_to_swa_index_mapping.nbytes
    counted = shape_of(spec, MODEL, REQUESTS + 1, "cuda").nbytes(PAGES * PAGE, PAGES * PAGE)
    assert counted == pool.get_kv_size_bytes()
    assert counted <= taken <= counted + 4096, "SGLang's own part of the pool is next to nothing"


def test_checks_find_a_changed_row(tmp_path):
    from sglang_dsv4.plugin.observe.checks import ServingChecks

    spec = make_spec()
    sequence = Sequence(spec, 900, 0, HEADS, "cuda")
    server = make_server(spec)
    server.backend.checks = ServingChecks(server.cache, "step", tmp_path)
    server.step([(1, sequence, 0, 300)])
    for at in range(300, 304):
        server.step([(1, sequence, at, at + 1)], decode=True)
    window = server.tables(1, 304)[1]
    row = int(window[0]) * 256 + 250
    server.cache.layers[0].pool[row, 7] += 1
    with pytest.raises(CacheInvariantError, match="r1"):
        server.step([(1, sequence, 304, 305)], decode=True)
