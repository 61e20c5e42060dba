"""`--dsv4-check`: what is planted in live pages is named, what lies in others never matters, and right runs pass."""

import pytest
import torch

from sglang_dsv4.attention import HostLengths
from sglang_dsv4.cache.regions import Kind, Part
from sglang_dsv4.cli import main
from sglang_dsv4.errors import CacheInvariantError
from tests.cache.driver import FORMATS, make_spec
from tests.plugin.small_server import PAGE, Sequence, SmallServer, Unattended, alone

pytestmark = pytest.mark.sglang


def checked_server(spec, level, folder):
    """With checks at a level (None: off)."""
    from sglang_dsv4.plugin.observe.checks import ServingChecks

    make_checks = level and (lambda cache: ServingChecks(cache, level, folder))
    return SmallServer(spec, heads=1, attention=Unattended, make_checks=make_checks)


def serve(server, sequence, other):
    """Two requests; the second one's slot goes to a third, which has the first one's prefix."""
    server.assign(1, [3, 5, 7])
    server.assign(2, [9, 10, 11])
    server.step([(1, sequence, 0, 400), (2, other, 0, 303)])
    server.step([(1, sequence, 400, 600)])
    server.assign(2, [3, 5, 12])
    server.step([(2, sequence, 512, 515), (1, sequence, 600, 601)])
    for length in range(515, 530):
        pair = [(2, sequence, length, length + 1), (1, sequence, length + 86, length + 87)]
        server.step(pair, decode=True)


@pytest.mark.parametrize("level", ["boundary", "step"])
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_a_right_run_passes(tmp_path, level, formats):
    spec = make_spec(formats)
    server = checked_server(spec, level, tmp_path)
    serve(server, Sequence(spec, 900, heads=1), Sequence(spec, 900, 1, heads=1))
    # The first step has nothing to read. The prefix hit is at 512 tokens; nothing else is at whole pages.
    assert server.backend.checks.num_run == {"boundary": 1, "step": 17}[level]
    assert server.backend.checks.num_failed == 0
    assert list(tmp_path.iterdir()) == []


ENTRIES = 25 * PAGE  # the first row of history page 0 in a pool

# Of a request of 301 tokens over history pages 3, 5 and window pages 22, 20: layer, kind, number, place, and the row.
PLANTED = [
    (0, "window row", 200, "window page 22", lambda layer: layer.pool[22 * 256 + 200]),
    (2, "window row", 300, "window page 20", lambda layer: layer.pool[20 * 256 + 44]),
    (1, "entry", 70, "history page 5", lambda layer: layer.pool[ENTRIES + 5 * 64 + 6]),
    (2, "entry", 1, "history page 3", lambda layer: layer.pool[ENTRIES + 3 * 2 + 1]),
    (1, "index key", 9, "history page 3", lambda layer: layer.tensor(Kind.INDEX_KEY, Part.INDEX)[3 * 64 + 9]),
    (1, "main stream row", 300, "state slot 1", lambda layer: layer.tensor(Kind.STREAM, Part.MAIN)[1, 300 % 8]),
    (1, "index stream row", 299, "state slot 1", lambda layer: layer.tensor(Kind.STREAM, Part.INDEX)[1, 299 % 8]),
    (2, "accumulator", 300, "state slot 1", lambda layer: layer.tensor(Kind.ACCUMULATOR, Part.MAIN)[1, 0, 2]),
]


def begin(level, folder, length=301):
    spec = make_spec()
    server, sequence = checked_server(spec, level, folder), Sequence(spec, 900, heads=1)
    server.assign(1, [3, 5])
    server.step([(1, sequence, 0, length)])
    return server, sequence


@pytest.mark.parametrize(("layer", "what", "index", "place", "row"), PLANTED)
@pytest.mark.parametrize("value", [1.0, float("nan")], ids=["wrong", "nan"])
def test_a_wrong_row_in_a_live_page_is_named(tmp_path, layer, what, index, place, row, value):
    server, sequence = begin("step", tmp_path)
    row(server.pool.cache.storage.layers[layer])[7] += value
    message = rf"^I8 sums: request r1: layer {layer}: {what} {index} in {place}: expected the checksum"
    with pytest.raises(CacheInvariantError, match=message):
        server.step([(1, sequence, 301, 302)], decode=True)
    assert server.backend.checks.num_failed == 1


@pytest.mark.parametrize(("layer", "what", "index", "place", "row"), PLANTED[:1] + PLANTED[2:3])
@pytest.mark.parametrize("level", [None, "boundary"])
def test_below_that_level_it_is_not_noticed(tmp_path, level, layer, what, index, place, row):
    server, sequence = begin(level, tmp_path)
    row(server.pool.cache.storage.layers[layer])[7] += 1.0
    server.step([(1, sequence, 301, 302)], decode=True)


@pytest.mark.parametrize(
    ("what", "row"),
    [
        ("window row 130", lambda layer: layer.pool[22 * 256 + 130]),
        ("entry 3", lambda layer: layer.pool[ENTRIES + 3 * 64 + 3]),
        ("main boundary row 0", lambda layer: layer.tensor(Kind.BOUNDARY, Part.MAIN)[22].flatten()),
    ],
)
def test_at_a_prefix_hit_the_level_boundary_names_it(tmp_path, what, row):
    server, sequence = begin("boundary", tmp_path, length=400)
    row(server.pool.cache.storage.layers[1])[7] += 1.0
    server.assign(2, [3, 8])
    with pytest.raises(CacheInvariantError, match=f"^I8 sums: request r2: layer 1: {what} "):
        server.step([(2, sequence, 256, 300)])


def test_pages_in_another_order_and_pages_never_written_are_named(tmp_path):
    server, sequence = begin("step", tmp_path, length=500)
    server.assign(1, [5, 3])
    with pytest.raises(CacheInvariantError, match="I8 sums: .* expected the checksum .* got another"):
        server.step([(1, sequence, 500, 501)], decode=True)
    server.assign(1, [3, 8])
    with pytest.raises(CacheInvariantError, match=r"I8 sums: .* page \d+: .* never written"):
        server.step([(1, sequence, 500, 501)], decode=True)


def test_a_nan_that_a_step_writes_is_named(tmp_path):
    server, sequence = begin("step", tmp_path)
    sequence.inputs.cut(0, "window", 301, 302).kv.fill_(float("nan"))
    with pytest.raises(CacheInvariantError, match="^I6 rows: request r1: layer 0: window row 301"):
        server.step([(1, sequence, 301, 302)], decode=True)


def test_nan_in_pages_that_nobody_holds_never_surfaces(tmp_path):
    """Every page but those of the request, and every other slot, and again after each step."""
    server, sequence = begin("step", tmp_path)
    spec, storage = server.pool.cache.spec, server.pool.cache.storage

    def poison(kept_history, kept_window):
        for layer, kind in zip(storage.layers, spec.layers, strict=True):
            pages = layer.pool[: storage.num_window_rows].unflatten(0, (-1, 256))
            free = [page for page in range(len(pages)) if page not in kept_window]
            pages[free] = float("nan")
            for stored in layer.regions:
                if stored.region.kind is Kind.BOUNDARY:
                    stored.tensor[free] = float("nan")
                if stored.region.kind is Kind.STREAM:
                    stored.tensor[[0, 2, 3]] = float("nan")
            if ratio := kind.ratio:
                entries = layer.pool[storage.num_window_rows :].unflatten(0, (-1, 256 // ratio))
                free = [page for page in range(len(entries)) if page not in kept_history]
                entries[free] = float("nan")

    for length in range(301, 320):
        poison({3, 5}, {22, 20})
        server.step([(1, sequence, length, length + 1)], decode=True)
    assert server.bytes_of(1, 320) == alone(spec, sequence, 320)
    # The twin: one page more.
    poison({3}, {22, 20})
    with pytest.raises(CacheInvariantError, match="I8 sums: .* entry 64 in history page 5"):
        server.step([(1, sequence, 320, 321)], decode=True)


def test_the_dump_says_what_happened(tmp_path, capsys):
    server, sequence = begin("step", tmp_path)
    server.pool.cache.storage.layers[1].pool[ENTRIES + 5 * 64 + 6][7] = float("inf")
    with pytest.raises(CacheInvariantError, match=r"; see `python -m sglang_dsv4 inspect (.*)`"):
        server.step([(1, sequence, 301, 302)], decode=True)
    (dump,) = tmp_path.iterdir()
    assert main(["inspect", str(dump)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "I8 sums: request r1: layer 1: entry 70 in history page 5",
        "511 of 512",
        "> r1",
        "history page 5 is held by r1.",
        "check step",
    ):
        assert text in printed


def test_a_folder_that_cannot_be_written_does_not_hide_the_finding(tmp_path):
    server, sequence = begin("step", tmp_path / "missing")
    server.pool.cache.storage.layers[0].pool[22 * 256 + 200] = 0
    with pytest.raises(CacheInvariantError, match="^I8 sums: request r1: .*; no dump, "):
        server.step([(1, sequence, 301, 302)], decode=True)


def test_something_else_is_no_dump(tmp_path, capsys):
    from safetensors.torch import save_file

    for name, content in (("text", b"hello"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    for name in ("text", "empty", "other", "missing"):
        assert main(["inspect", str(tmp_path / name)]) == 1
        assert "expected an sglang-dsv4 integrity dump" in capsys.readouterr().err


def test_the_digest_of_a_prefix_hit_is_that_of_a_cold_run(tmp_path):
    """The same tokens in other pages and another slot, in one step or behind a hit; and with one value changed."""
    spec = make_spec()
    server, sequence = checked_server(spec, "step", tmp_path), Sequence(spec, 900, heads=1)
    digests = server.backend.checks.digests
    server.assign(1, [3, 5])
    server.step([(1, sequence, 0, 400)])
    cold = digests["r1"]
    assert cold[0] == 400
    server.assign(2, [3, 8])
    server.step([(2, sequence, 256, 400)])
    server.assign(3, [9, 10])
    server.step([(3, sequence, 0, 301)])
    assert digests["r3"] != cold
    server.step([(3, sequence, 301, 400)])
    assert digests["r2"] == digests["r3"] == cold
    plan, lengths, row = server.pool.step.plan, HostLengths([400], [99]), ENTRIES + 9 * 64 + 6
    server.pool.cache.storage.layers[1].pool[ENTRIES + 8 * 64 + 6][7] += 1.0
    server.backend.checks.after(plan, lengths, ["r3"])
    assert digests["r3"] == cold
    server.pool.cache.storage.layers[1].pool[row][7] += 1.0
    server.backend.checks.after(plan, lengths, ["r3"])
    assert digests["r3"][0] == 400 and digests["r3"] != cold


def test_digests_of_the_last_requests_are_kept(tmp_path, monkeypatch):
    from sglang_dsv4.plugin.observe import checks

    monkeypatch.setattr(checks, "DIGESTS_KEPT", 2)
    server, sequence = begin("step", tmp_path, length=8)
    for slot in (2, 3):
        server.assign(slot, [slot + 8])
        server.step([(slot, sequence, 0, 8)])
    assert list(server.backend.checks.digests) == ["r2", "r3"]
