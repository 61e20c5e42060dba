"""A server that crashes during a comparison: the reference may lose some of its own, what is judged may not."""

import dataclasses
import sys

import httpx
import pytest

from sglang_dsv4.check.compare import runs, session
from sglang_dsv4.check.compare.ask import Answer, Question, Token
from sglang_dsv4.check.compare.client import StreamError
from sglang_dsv4.check.compare.runs import Passes, Run
from sglang_dsv4.check.compare.side import Side, SideServer, naming_the_dead
from sglang_dsv4.check.demo.server import ServerDiedError

REFERENCE = [Side("theirs-1", False, ()), Side("theirs-2", False, ())]
JUDGED = Side("ours", True, ())
QUESTIONS = [Question((1, 2, 3), 2)]
ANSWER = Answer((Token(5, -1.0, 5, 2.0), Token(6, -1.0, 6, 2.0)), 0)
LAST_WORDS = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"


class CrashingServer(SideServer):
    """A process that is no server, and ends after its side was asked, where the side's name is among `crashing`."""

    crashing: set[str] = set()

    def __init__(self, side, checkpoint, folder, device):
        super().__init__(side, checkpoint, folder, device)
        program = "import time; print('here', flush=True); time.sleep(60)"
        if side.name in self.crashing:
            program = f"import sys; print('here'); print({LAST_WORDS!r}); print('terminate called'); sys.exit(3)"
        self._command = [sys.executable, "-c", program]

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
    monkeypatch.setattr(runs, "SideServer", CrashingServer)
    monkeypatch.setattr(runs, "facts_of", lambda server: {})
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


def test_nothing_is_lost_where_none_crashed(compare):
    result, _ = compare()
    assert result.lost == {} and len(result.own) == 3


def test_a_reference_that_crashed_as_a_whole_compares_nothing(compare):
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


def process(program, folder):
    server = CrashingServer(JUDGED, folder, folder, "cpu")
    server._command = [sys.executable, "-c", program]
    return server


@pytest.mark.parametrize("error", [httpx.ReadError("gone"), OSError("gone"), StreamError("gone")])
def test_a_lost_connection_is_the_end_of_the_server_or_what_it_was(tmp_path, error):
    """The second half is the twin: a server that lives is not to blame."""
    slowly = "import sys, time; time.sleep(0.5); sys.exit(7)"
    with process(slowly, tmp_path) as server, pytest.raises(ServerDiedError, match="status 7"), naming_the_dead([server]):
        raise error
    with (
        process("import time; time.sleep(60)", tmp_path) as server,
        pytest.raises(type(error), match="gone"),
        naming_the_dead([server], limit_s=0.6),
    ):
        raise error


def test_other_errors_do_not_wait_for_a_server_to_end(tmp_path):
    with process("import sys; sys.exit(7)", tmp_path) as server:
        server._process.wait()
        with pytest.raises(ValueError, match="ours"), naming_the_dead([server]):
            raise ValueError("ours")
