"""The servers of a comparison: they start and end together, end whatever happens, and some may crash."""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from sglang_dsv4.check.compare import fleet as fleet_module
from sglang_dsv4.check.compare import session
from sglang_dsv4.check.compare.answers import Passes, Run
from sglang_dsv4.check.compare.command import add_parser, make_bytes_side, make_plan
from sglang_dsv4.check.reply import Question, Reply, Token
from sglang_dsv4.check.server import OURS, THEIRS, Server, ServerDiedError, Side

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


class SmallServer(Server):
    """A process that is no server."""

    def __init__(self, side, checkpoint, folder, device):
        super().__init__(side, checkpoint, folder, device)
        self.command = [sys.executable, "-c", POLITE, side.name]

    def is_ready(self):
        self.check_alive()
        return self.log_lines() == ["here"]


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    monkeypatch.setattr(fleet_module, "Server", SmallServer)
    monkeypatch.setattr(fleet_module, "facts_of", lambda server: {})
    return fleet_module.Fleet(tmp_path, tmp_path, "cpu")


def test_servers_end_at_the_same_time_and_one_that_was_launched_is_not_started_again(fleet, tmp_path):
    with fleet:
        fleet.launch(SIDES[2:])
        first = fleet.start(SIDES[:2])
        (third,) = fleet.start(SIDES[2:])
        assert [server.side for server in (*first, third)] == SIDES
        assert len({server.group for server in (*first, third)}) == 3
    assert [(tmp_path / f"{side.name}.log").read_text().split()[-1] for side in SIDES] == ["together"] * 3


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
from sglang_dsv4.check.compare import fleet
from tests.check.compare.test_fleet import SmallServer
from sglang_dsv4.cli import main
SmallServer.is_ready = lambda self: False
fleet.Server = SmallServer
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


REFERENCE = [Side("theirs-1", False, ()), Side("theirs-2", False, ())]
JUDGED = Side("ours", True, ())
QUESTIONS = [Question((1, 2, 3), 2)]
ANSWER = Reply((Token(5, -1.0, 5, 2.0), Token(6, -1.0, 6, 2.0)))
LAST_WORDS = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"


class CrashingServer(Server):
    """A process that is no server, and ends after its side was asked, where the side's name is among `crashing`."""

    crashing: set[str] = set()

    def __init__(self, side, checkpoint, folder, device):
        super().__init__(side, checkpoint, folder, device)
        program = "import time; print('here', flush=True); time.sleep(60)"
        if side.name in self.crashing:
            program = f"import sys; print('here'); print({LAST_WORDS!r}); print('terminate called'); sys.exit(3)"
        self.command = [sys.executable, "-c", program]

    def is_ready(self):
        return True


async def run_passes(passes, client, name):
    """What `Passes.run` does, for servers that are none."""
    if name in CrashingServer.crashing:
        raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
    hit = dataclasses.replace(ANSWER, cached_tokens=2)
    return [Run(f"{name} {kind}", [hit if kind == "hit" else ANSWER]) for kind in ("cold", "hit", "again")]


async def no_scores(*_):
    return {0: list(ANSWER.tokens)}


async def no_plant(*_):
    return None


@pytest.fixture
def compare(tmp_path, monkeypatch):
    monkeypatch.setattr(fleet_module, "Server", CrashingServer)
    monkeypatch.setattr(fleet_module, "facts_of", lambda server: {})
    monkeypatch.setattr(Passes, "run", run_passes)
    monkeypatch.setattr(session, "_scores", no_scores)
    monkeypatch.setattr(session, "_plant", no_plant)

    def run(*crashing, at_once=3):
        monkeypatch.setattr(CrashingServer, "crashing", set(crashing))
        plan = session.Plan(REFERENCE, [JUDGED], None, Passes(QUESTIONS, 1), at_once, 0)
        said = []
        result, _ = session.run_session(tmp_path, tmp_path, "cpu", plan, None, said.append)
        return result, said

    return run


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("lost", ["theirs-1", "theirs-2"])
def test_what_is_judged_is_compared_with_the_servers_that_are_left(compare, lost, at_once):
    result, said = compare(lost, at_once=at_once)
    assert result.lost == {lost: LAST_WORDS}
    assert f"{lost}: CRASHED, {LAST_WORDS}" in said
    assert set(result.verdicts) == {f"ours {kind}" for kind in ("cold", "hit", "again")}
    assert set(result.own) == {side.name for side in (*REFERENCE, JUDGED)} - {lost}
    assert not result.faults


def test_nothing_is_lost_where_none_crashed_and_all_where_the_whole_reference_did(compare):
    result, _ = compare()
    assert result.lost == {} and len(result.own) == 3
    with pytest.raises(ServerDiedError, match="expected one server that answers, got .*theirs-1"):
        compare("theirs-1", "theirs-2")


def test_a_server_of_ours_may_not_crash_as_the_reference_either(compare, monkeypatch):
    """On a CPU ours is both."""
    ours_first = [dataclasses.replace(REFERENCE[0], is_ours=True), REFERENCE[1]]
    monkeypatch.setattr(sys.modules[__name__], "REFERENCE", ours_first)
    with pytest.raises(ServerDiedError, match="the end of .*theirs-1.log"):
        compare("theirs-1")


def test_a_judged_server_that_crashed_ends_the_comparison_and_is_named(compare):
    with pytest.raises(ServerDiedError, match="status 3; the end of .*ours.log"):
        compare("ours")
