"""The servers of a comparison: they start and end together, and end whatever happens."""

import argparse
import os
import signal
import subprocess
import sys
import time

import pytest

from sglang_dsv4.check.compare import runs
from sglang_dsv4.check.compare.command import add_parser, make_bytes_side, make_plan
from sglang_dsv4.check.compare.side import OURS, THEIRS, Side, SideServer

# Told to end, it waits until all three were told so.
POLITE = """
import glob, pathlib, signal, sys, time
def leave(*_):
    pathlib.Path(sys.argv[1] + ".asked").touch()
    deadline = time.monotonic() + 2
    while len(glob.glob("*.asked")) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    print("together" if len(glob.glob("*.asked")) == 3 else "alone", flush=True)
    raise SystemExit
signal.signal(signal.SIGTERM, leave)
print("here", flush=True)
time.sleep(60)
"""
SIDES = [Side(name, True, ()) for name in "abc"]


class SmallServer(SideServer):
    """A process that is no server."""

    def __init__(self, side, checkpoint, folder, device):
        super().__init__(side, checkpoint, folder, device)
        self._command = [sys.executable, "-c", POLITE, side.name]

    def is_ready(self):
        self.check_alive()
        return self.log_lines() == ["here"]


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SideServer", SmallServer)
    monkeypatch.setattr(runs, "facts_of", lambda server: {})
    return runs.Fleet(tmp_path, tmp_path, "cpu")


def last_lines(tmp_path):
    return [(tmp_path / f"{side.name}.log").read_text().split()[-1] for side in SIDES]


def test_servers_end_at_the_same_time(fleet, tmp_path):
    with fleet:
        fleet.start(SIDES)
    assert last_lines(tmp_path) == ["together"] * 3


def test_a_server_that_was_launched_is_not_started_again(fleet, tmp_path):
    with fleet:
        fleet.launch(SIDES[2:])
        first = fleet.start(SIDES[:2])
        (third,) = fleet.start(SIDES[2:])
        assert [server.side for server in (*first, third)] == SIDES
        assert len({server.group for server in (*first, third)}) == 3
    assert last_lines(tmp_path) == ["together"] * 3


def test_all_servers_of_a_comparison_start_at_once_on_a_gpu():
    """SGLang compiles for minutes at a first start; one after the other that would be half an hour."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    for rows, others in (("fp8_584", 0), ("bf16", 1)):
        args = parser.parse_args(["compare", "--rows", rows, "--device", "cuda"])
        plan = make_plan(args, "cuda")
        names = [side.name.partition("-")[0] for side in plan.sides]
        assert names == [*[THEIRS] * 3, *[OURS] * (3 + others)]
        assert plan.at_once > len(plan.sides)
        assert make_bytes_side(args, "cuda") not in plan.sides
        assert plan.num_exact > 0
    alone = make_plan(parser.parse_args(["compare", "--device", "cpu"]), "cpu")
    assert (alone.at_once, alone.num_exact) == (1, 0)


# A command whose servers would run for minutes; the test of another process sees what is left of them.
TERMINATED = """
import sys
from sglang_dsv4.check.compare import runs
from tests.check.compare.test_fleet import SmallServer
from sglang_dsv4.cli import main
SmallServer.is_ready = lambda self: False
runs.SideServer = SmallServer
main(["compare", "--device", "cpu", "--model", sys.argv[1], "--build-dir", sys.argv[1], "--requests", "1"])
"""


def test_servers_end_with_a_comparison_that_is_terminated(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    process = subprocess.Popen([sys.executable, "-c", TERMINATED, str(tmp_path)])
    log, deadline = tmp_path / "compare" / "ours-eager-8192.log", time.monotonic() + 60
    while not (log.exists() and "here" in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert log.read_text().split() == ["here", "alone"]
