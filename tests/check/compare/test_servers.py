"""`compare` and `bench serve` with real servers on a CPU, where our cache is compared with itself."""

import json
import shlex

import pytest

from sglang_dsv4.check.compare.answers import read_answers
from sglang_dsv4.check.compare.questions import PLANTED
from sglang_dsv4.cli import main

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.long, pytest.mark.soak]


def test_compare_passes_notices_planted_faults_and_finds_the_bytes_of_hits_equal(tmp_path):
    file = tmp_path / "compare.json"
    options = "--requests 6 --longest 600 --concurrency 3 --ways eager-512,eager-256 --device cpu --exact 3"
    status = main(["compare", *shlex.split(options), "--build-dir", str(tmp_path), "--json", str(file)])
    report = json.loads(file.read_text())
    assert status == 0, report["faults"]
    assert 0 < report["bound"]["own_rounding"] < 1e-3
    for spread in report["from_exact"].values():
        assert 0 < spread["typical"] < spread["largest"] < 1e-3
    assert report["bound"]["typical_bound"] < report["bound"]["bound"] < 4e-3
    assert [planted["fault"] for planted in report["planted"]] == list(PLANTED)
    kinds = ("cold", "hit", "again")
    assert set(report["verdicts"]) == {f"ours-eager-256 {kind}" for kind in kinds}
    assert set(report["own"]) == {"ours-eager-512", "ours-eager-256"}
    for own in report["own"].values():
        assert all(own[kind]["largest"] < 1e-3 for kind in ("hit", "again"))
    questions, runs, where = read_answers(tmp_path / "compare" / "answers.json")
    assert len(questions) == 6 and where == report["environment"]
    assert set(runs) == {f"ours-eager-{n} {kind}" for n in (512, 256) for kind in kinds}
    for verdict in report["verdicts"].values():
        assert verdict["answers"] == 6 and verdict["certain"] > 0.9 * verdict["tokens"] > 20
    assert all(planted["noticed"] == planted["tried"] > 0 for planted in report["planted"])
    assert report["bytes"]["compared"] == 9 and not report["bytes"]["faults"]
    assert report["environment"]["versions"]["sglang"] is not None


def test_bench_serve_measures_ours_alone_and_says_so(tmp_path, capsys):
    file = tmp_path / "serve.json"
    arguments = ["bench", "serve", "--device", "cpu", "--only", "agents", "--build-dir", str(tmp_path)]
    assert main([*arguments, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    (row,) = report["rows"]
    assert row["work"] == "agents-4" and "sglang" not in row
    assert 0.2 < row["ours"]["cached_share"] < 1 and row["ours"]["output_tokens"] == 4 * 3 * 8
    assert report["check"]["num_faults"] == 0 and report["check"]["tokens"] > 0
    assert "does not run on a CPU: ours alone was measured" in capsys.readouterr().out
