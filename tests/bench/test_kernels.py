"""`bench kernels`: what is wrong is not timed; rows of two versions are compared by their spread."""

import argparse
import json
from types import SimpleNamespace

import pytest

from sglang_dsv4.bench import attention, command, flush, index, job, step_plan
from sglang_dsv4.bench.timing import Timing
from sglang_dsv4.cli import main
from tests.bench.kernel_checks import CHECKS, CPU
from tests.kernels.interpreting import interpreted


@pytest.fixture(scope="module")
def results():
    return interpreted("tests.bench.kernel_checks")


@pytest.mark.parametrize("check", CHECKS)
def test_what_is_wrong_is_not_timed(results, check):
    assert results[check] == ""


@pytest.mark.parametrize("ops", [(flush, step_plan, index), (attention,)])
def test_every_quick_case_is_among_all_and_named_once_a_format(ops):
    every, quick = ([name for op in ops for name, _ in op.jobs(fewer, CPU)] for fewer in (False, True))
    assert set(quick) <= set(every) and len(quick) < len(every)
    assert all(every.count(name) <= 3 for name in every)


def write(path, **rows):
    """A report: for each case its median, p10 and p90."""
    path.parent.mkdir(exist_ok=True)
    names = ("us", "p10_us", "p90_us")
    made = [{"op": "flush", "case": case, "row_format": "bf16", **dict(zip(names, t, strict=True))} for case, t in rows.items()]
    path.write_text(json.dumps({"rows": made}))
    return str(path)


@pytest.mark.parametrize(
    ("before", "after", "status", "said"),
    [
        ((5, 4.9, 5.1), (5.15, 5.12, 5.2), 0, "0 slower"),
        ((5, 4.9, 5.1), (5.25, 5.2, 5.3), 1, "1 slower"),
        ((5, 4.9, 5.1), (5.3, 5.0, 5.9), 0, "0 slower"),
        ((5, 4.9, 5.1), (4.5, 4.4, 4.6), 0, "1 faster"),
    ],
)
def test_a_row_is_slower_where_its_spread_does_not_explain_it(tmp_path, capsys, before, after, status, said):
    files = write(tmp_path / "a.json", b1=before), write(tmp_path / "b.json", b1=after)
    assert main(["bench", "diff", *files]) == status
    assert said in capsys.readouterr().out


def test_runs_of_a_folder_are_one_spread_and_a_missing_row_fails(tmp_path, capsys):
    for run, us in enumerate((5.0, 5.4)):
        write(tmp_path / "before" / f"{run}.json", b1=(us, us, us))
    before, same = str(tmp_path / "before"), write(tmp_path / "same.json", b1=(5.3, 5.3, 5.3), b2=(1, 1, 1))
    assert main(["bench", "diff", before, same]) == 0
    assert main(["bench", "diff", same, before]) == 1
    assert "2 rows: 0 slower, 0 faster, 1 missing, 0 new" in capsys.readouterr().out
    for fault in (str(tmp_path / "none.json"), write(tmp_path / "empty.json")):
        assert main(["bench", "diff", before, fault]) == 1
        assert "FAILED" in capsys.readouterr().out


def test_rows_are_printed_written_and_compared(tmp_path, capsys, monkeypatch):
    """One job with a column for its peer, one with a row for each variant; only what is asked for runs."""
    monkeypatch.setattr(job, "time_graphs", lambda calls: {name: Timing(2.0 + len(calls[name]), 1.0, 9.0) for name in calls})
    monkeypatch.setattr(command, "need_cuda", lambda what: CPU)
    monkeypatch.setattr(command, "copy_bandwidth", lambda: 100.0)
    monkeypatch.setattr(command, "environment", lambda device: {"gpu": "G", "versions": {"torch": "1", "triton": "2"}})
    both = (job.Job("a", "b1", "s", "bf16", "int", 300, lambda: {"launches": 1}, {"ours": [1], "sglang": [1, 2]}),)
    each = (job.Job("b", "b2", "s", "bf16", "", 300, lambda: {"v": {"error": 0.5}}, {"v": [1], "w": [1]}),)
    op = SimpleNamespace(PEERS=("not_there",), jobs=lambda quick, device: [("a b1", lambda: both), ("b b2", lambda: each)])
    file = tmp_path / "rows.json"
    for only, count in (("b1", 1), ("", 3)):
        assert command.run((op,), argparse.Namespace(what="kernels", quick=True, only=only, json=file)) == 0
        report = json.loads(file.read_text())
        assert len(report["rows"]) == count
    row = report["rows"][0]
    assert (row["us"], row["sglang_us"], row["copy_percent"], row["launches"]) == (3.0, 4.0, 100.0, 1)
    assert [row.get("variant") for row in report["rows"]] == [None, "v", "w"]
    assert report["not_run"] == ["not_there cannot be imported: No module named 'not_there'"]
    assert "sglang 4.00 (1.33x), launches 1" in capsys.readouterr().out
    assert main(["bench", "diff", str(file), str(file)]) == 0
