"""What a user sees: reports, pictures, progress."""

import io
import json

import pytest
from rich.console import Console

from sglang_dsv4.runtime.show import progress
from sglang_dsv4.runtime.show.units import format_bytes
from tests.runtime.worlds import make_runtime


@pytest.fixture(scope="module")
def runtime(small_checkpoint):
    return make_runtime(small_checkpoint, page_tokens=256, num_pages=12)


def rendered(thing, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(thing)
    return console.file.getvalue().splitlines()


def test_report_adds_up(runtime):
    with runtime.open("The [bold] & <brave>") as handle:
        report = runtime.report()
        pools = report.to_dict()["cache"]["bytes_by_pool"]
        assert sum(pools.values()) == report.cache.total_bytes
        snapshots = pools.pop("snapshots")
        assert snapshots == report.index["state_bytes"] - 4 * 264 * report.index["ends"] > 0
        assert (pools.pop("undo"), pools.pop("scratch")) == (0, 0)
        assert pools == runtime.cache.storage.bytes_by_pool()
        json.dumps(report.to_dict())
        request = handle.live().request
        assert report.texts == {request.req_id: "The [bold] & <brave>"}
        text, html = str(report), report._repr_html_()
        for shown in ("window rows", "per token of context", "Prefix index", "1 of 16 state slots"):
            assert shown in text and shown in html
        assert "[bold] & <brave>" in text and "[bold] &amp; &lt;brave&gt;" in html
        assert html.count("<table>") == 3
    assert "Open sequences" not in str(runtime.report())
    assert all(len(line) <= 80 for line in rendered(runtime.report(), 80))


def test_report_counts_state_beside_the_pools(runtime):
    runtime.engine.index.clear()
    assert runtime.report().index["state_bytes"] == 0
    runtime.open("abc").close()
    report = runtime.report()
    assert report.index["state_bytes"] == report.cache.stream_bytes_per_request + 4 * 264


def test_picture_of_a_short_sequence(runtime):
    with runtime.open("a cup of green tea!!") as handle:
        picture = handle.show()
        lines = str(picture).splitlines()
        assert lines[0].startswith("20 tokens; pages of 256")
        assert "   ".join("a·cup·of·green·tea!!") in lines[2]
        csa = next(line for line in lines if line.startswith("CSA 4"))
        assert "5 entries, tail 0/4, in 1 layers" in csa
        borders = [column for column, char in enumerate(csa) if char == "│"]
        assert borders == [borders[0] + 16 * i for i in range(5)]  # four columns per token
        hca = next(line for line in lines if line.startswith("HCA 128"))
        assert "20/128" in hca and "0 entries" in hca
        page = handle.live().request.pages.history[0]
        assert f"h{page}×2 w" in lines[-1]  # the handle and the index
        assert "0..19" in lines[-2]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_picture_of_a_long_sequence(runtime, width):
    with runtime.open("word " * 140) as handle:
        picture = handle.show()
        lines = rendered(picture, width)
        text = "\n".join(lines)
        assert all(len(line) <= width for line in lines)
        for shown in ("700 tokens", "175 entries, tail 0/4", "5 entries, tail 60/128", "w–"):
            assert shown in text
        assert [box.window is None for box in picture.pages] == [True, True, False]
        assert (picture.window_begin, picture.pages[2].end) == (573, 700)


def test_picture_counts_what_is_to_be_fed(runtime):
    with runtime.open("some tokens") as handle:
        handle.truncate(8)
        assert str(handle.show()).startswith("7 tokens, 1 more to be fed")
        handle.truncate(3)
        assert "HCA" in str(handle.show())


@pytest.mark.parametrize("text", ["a cup", "word " * 140, "茶 $x_1$ \x00 ☕"])
def test_figures(runtime, text, tmp_path):
    with runtime.open(text) as handle:
        picture = handle.show()
        svg = picture._repr_svg_()
        assert svg.rstrip().endswith("</svg>") and len(svg) < 400_000
        picture.save(str(tmp_path / "picture.png"))
        assert (tmp_path / "picture.png").stat().st_size > 5000
        axes = picture.figure().axes[0]
        boxes = 1 if picture.seq_len > 48 else picture.seq_len  # tokens
        boxes += sum(lane.num_entries + (lane.tail_len > 0) for lane in picture.lanes)
        assert len(axes.patches) == boxes + 1 + len(picture.pages)


def test_progress_in_a_notebook(runtime, monkeypatch):
    shown = []

    class Handle:
        def display(self, bar):
            shown.append(repr(bar))

        update = display

    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.DisplayHandle", Handle)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_UPDATES", 0.0)
    runtime.generate(["two", "three"], 3, stop=())
    assert shown[0].startswith("0/14 tokens") and shown[-1].startswith("14/14 tokens")
    assert "2 in the batch, 6 new tokens" in shown[-1]


def test_progress_in_a_terminal(runtime, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    runtime.generate(["abcd"], 3, stop=())
    runtime.generate(["abcd"], 3, stop=(), progress=False)
    assert not progress.in_notebook()


def test_units():
    sizes = (0, 1023, 1024, 1536, 5 * 2**30, 2**50)
    shown = ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 GiB", "1024.0 TiB"]
    assert [format_bytes(size) for size in sizes] == shown
