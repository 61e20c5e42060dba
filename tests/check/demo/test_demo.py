"""The demonstration as a whole, with the server replaced by the oracle: it passes when all is right and fails otherwise."""

import asyncio
from dataclasses import replace
from os.path import commonprefix

import pytest
import torch

from sglang_dsv4.check.demo import command, workload
from sglang_dsv4.check.demo.report import printable
from sglang_dsv4.check.demo.standards import Standard
from sglang_dsv4.check.demo.workload import PAGE_TOKENS, Answer, PlannedRequest, ask_waves, check_answers, plan_requests
from sglang_dsv4.check.faults import DroppedBStream
from sglang_dsv4.check.oracle import Oracle
from sglang_dsv4.check.reply import Reply, Token, tokens_along
from sglang_dsv4.check.server import ServerDiedError
from sglang_dsv4.cli import main

REPORT = {"row_format": "bf16", "index_format": "bf16", "history_bytes_per_token": 100.5, "stream_bytes_per_request": 4096}
REPORT |= {"bytes_by_pool": {"row_pools": 1 << 20, "streams": 1 << 10}, "total_bytes": (1 << 20) + (1 << 10)}
TOKENS = workload._cut(100, 264)
REQUESTS = (
    PlannedRequest("short", TOKENS[:5], wave=1),
    PlannedRequest("first", TOKENS, wave=1),
    PlannedRequest("again", TOKENS, wave=2, min_cached_tokens=PAGE_TOKENS),
)
NEW_TOKENS = 3


class FakeServer:
    """Stands for the child process; says what a plug-in says."""

    url, lines = "http://nowhere", ("sglang_dsv4 active: stand-in",)

    def __init__(self, side, checkpoint, folder):
        self.log = folder / "server.log"

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def check_alive(self): ...

    def is_ready(self):
        return True

    def log_lines(self):
        return self.lines


class FakeClient:
    """Generates greedily with a model whose rows are rounded as the cache's are, in fp64."""

    row_format = "bf16"
    fault_after_hit = False
    is_ours = True

    def __init__(self, url):
        self.seen = set()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_): ...

    async def plugin_facts(self):
        if not self.is_ours:
            raise ValueError("/server_info: expected facts of sglang_dsv4, got none")
        return {"report": REPORT}

    def spoil(self, reply):
        return reply

    async def generate(self, prompt_ids, new_tokens, token_ids_logprob):
        assert token_ids_logprob == list(range(264))
        is_hit = prompt_ids in self.seen
        self.seen.add(prompt_ids)
        fault = DroppedBStream(PAGE_TOKENS // 4) if self.fault_after_hit and is_hit else None
        tokens, rows = list(prompt_ids), []
        for _ in range(new_tokens):
            logprobs = self.oracle.logprobs(tokens, dtype=torch.float64, row_format=self.row_format, fault=fault)
            rows.append(logprobs[-1])
            tokens.append(int(rows[-1].argmax()))
        rows = torch.stack(rows)
        cached = PAGE_TOKENS if is_hit else 0
        output = tokens_along(rows, tokens[len(prompt_ids) :])
        return self.spoil(Reply(output, "t", "length", len(prompt_ids), cached, distributions=rows))


@pytest.fixture(scope="module")
def build_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("build")


@pytest.fixture
def demo(build_dir, monkeypatch):
    """A function that runs the demonstration with a stand-in server; gives the exit status."""

    def one_oracle(checkpoint):
        FakeClient.oracle = getattr(FakeClient, "oracle", None) or Oracle(checkpoint)
        return FakeClient.oracle

    def run(row_format="bf16", server=FakeServer, **attributes):
        monkeypatch.setattr(command, "Client", type("Client", (FakeClient,), {"row_format": row_format, **attributes}))
        monkeypatch.setattr(command, "Server", server)
        monkeypatch.setattr(command, "Oracle", one_oracle)
        monkeypatch.setattr(command, "plan_requests", lambda: REQUESTS)
        monkeypatch.setattr(command, "NEW_TOKENS", NEW_TOKENS)
        return main(["demo", "--build-dir", str(build_dir), "--dsv4-kv-format", row_format])

    return run


@pytest.mark.parametrize("row_format", ["fp32", "bf16", "fp8_584"])
def test_right_answers_pass(demo, row_format, capsys):
    assert demo(row_format) == 0
    printed = capsys.readouterr().out
    assert "RIGHT" in printed and "sglang_dsv4 active: stand-in" in printed and "1.00" in printed


def other_token(self, reply):
    """The last one, which no other position has read."""
    last = reply.tokens[-1]
    return replace(reply, tokens=(*reply.tokens[:-1], last._replace(token_id=last.token_id + 1)))


def other_logprob(self, reply):
    rows = reply.distributions.clone()
    rows[-1, 7] += 1.0
    return replace(reply, distributions=rows)


def no_hit(self, reply):
    return replace(reply, cached_tokens=0)


def cut_short(self, reply):
    return replace(reply, tokens=reply.tokens[:-1], distributions=reply.distributions[:-1])


class Silent(FakeServer):
    lines = ()


class Dying(FakeServer):
    def is_ready(self):
        raise ServerDiedError("the server ended with status 3")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"spoil": other_token}, "token 2: expected"),
        ({"spoil": other_logprob}, "log-probability is off"),
        ({"spoil": no_hit}, "from the prefix cache"),
        ({"spoil": cut_short}, "generated tokens, got 2"),
        ({"fault_after_hit": True}, "again (rows as bf16)"),
        ({"is_ours": False}, "expected facts of sglang_dsv4"),
        ({"server": Silent}, "has no line that says"),
        ({"server": Dying}, "status 3"),
    ],
)
def test_each_wrong_thing_fails(demo, attributes, message, capsys):
    assert demo(**attributes) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert message in printed and "FAILED" in printed and "RIGHT" not in printed


@pytest.mark.parametrize("error", [0.0, 1e-3, float("nan")])
def test_a_control_that_is_not_noticed_fails(error):
    (fault,) = Standard("exact", (), 1e-3, "a fault", error).faults()
    assert "proves nothing" in fault
    assert Standard("exact", (), 1e-3, "a fault", 2e-3).faults() == []


def make_answer(cached=0, minimum=0):
    return Answer(PlannedRequest("one", (8, 9, 10), 1, minimum), Reply((Token(3),) * 4, cached_tokens=cached), 0.1)


@pytest.mark.parametrize(
    ("cached", "minimum", "is_right"), [(0, 0, True), (2, 2, True), (2, 1, True), (1, 2, False), (0, 2, False), (3, 2, False)]
)
def test_prefix_hits_are_as_long_as_they_must_be_and_never_the_whole_prompt(cached, minimum, is_right):
    assert (check_answers([make_answer(cached, minimum)], 4) == []) is is_right


def test_a_short_answer_fails():
    assert check_answers([make_answer()], 5) == ["one: expected 5 generated tokens, got 4"]


def test_positions_of_generated_tokens():
    """The token after prompt position 2 is the first generated; the last one is never read."""
    answer = make_answer()
    assert answer.token_ids == (8, 9, 10, 3, 3, 3)
    assert list(range(6))[answer.generated] == [2, 3, 4, 5]


def test_waves_are_sent_together_and_one_after_the_other():
    requests = (PlannedRequest("late", (1,), 2), PlannedRequest("first", (3,), 1), PlannedRequest("also first", (4,), 1))
    sent, together, steps = [], asyncio.Barrier(2), []

    class Client:
        async def generate(self, prompt_ids, new_tokens, token_ids_logprob):
            sent.append(prompt_ids)
            if prompt_ids != (1,):
                await asyncio.wait_for(together.wait(), 10)
            return Reply((), distributions=torch.zeros(0, 5))

    answers = asyncio.run(ask_waves(Client(), requests, 3, 5, lambda: steps.append(1)))
    assert [answer.request for answer in answers] == list(requests)
    assert sent[-1] == (1,) and len(steps) == 3


def test_the_workload_has_what_it_promises():
    requests = plan_requests()
    lengths = sorted(len(request.prompt_ids) for request in requests)
    assert lengths[0] < 4 and lengths[-1] > 600
    for boundary in (4, 128, 256):
        assert any(abs(length - boundary) <= 1 for length in lengths)
    first_wave = [request for request in requests if request.wave == 1]
    assert len({request.prompt_ids[:3] for request in first_wave}) == len(first_wave)
    for request in requests:
        shared = max(len(commonprefix([request.prompt_ids, other.prompt_ids])) for other in first_wave)
        if request.wave == 2:
            assert shared > PAGE_TOKENS and request.min_cached_tokens == PAGE_TOKENS


def test_text_of_a_model_cannot_drive_the_terminal():
    assert printable("a\x1b[31mb\nc") == "a·[31mb·c"
    assert len(printable("x" * 100)) < 30
