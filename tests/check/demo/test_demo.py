"""The demonstration as a whole, with the server replaced by the oracle: it passes when all is right and fails otherwise."""

import argparse
import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_dsv4.check.demo import command, workload
from sglang_dsv4.check.demo.answers import Answer
from sglang_dsv4.check.demo.report import printable
from sglang_dsv4.check.demo.workload import PAGE_TOKENS, PlannedRequest, plan_requests
from sglang_dsv4.check.faults import DroppedBStream
from sglang_dsv4.check.oracle import Oracle

FACTS = {
    "version": "0",
    "report": {
        "row_format": "bf16",
        "index_format": "bf16",
        "bytes_by_pool": {"row_pools": 1 << 20, "streams": 1 << 10},
        "total_bytes": (1 << 20) + (1 << 10),
        "history_bytes_per_token": 100.5,
        "stream_bytes_per_request": 4096,
    },
}
TOKENS = workload._cut(100, 264)
REQUESTS = (
    PlannedRequest("short", TOKENS[:5], wave=1),
    PlannedRequest("first", TOKENS, wave=1),
    PlannedRequest("again", TOKENS, wave=2, min_cached_tokens=PAGE_TOKENS),
)
NEW_TOKENS = 3


class FakeServer:
    """Stands for the child process; says what a plug-in says."""

    def __init__(self, checkpoint: Path, log: Path, arguments: tuple[str, ...]) -> None:
        self.url, self.log, self.port = "http://nowhere", log, 0
        self.lines = ["sglang_dsv4 active: stand-in"]

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None: ...

    def check_alive(self) -> None: ...

    def log_lines(self) -> list[str]:
        return self.lines


class FakeClient:
    """Generates greedily with a model whose rows are rounded as the cache's are, in fp64."""

    oracle: Oracle
    row_format = "bf16"
    fault_after_hit = False
    facts: dict | None = FACTS

    def __init__(self, url: str, vocab_size: int) -> None: ...

    def close(self) -> None: ...

    def is_healthy(self) -> bool:
        return True

    def plugin_facts(self) -> dict | None:
        return self.facts

    def run(self, requests, new_tokens, step) -> list[Answer]:
        return [self.spoil(self.generate(request, new_tokens)) for request in requests]

    def spoil(self, answer: Answer) -> Answer:
        return answer

    def generate(self, request: PlannedRequest, new_tokens: int) -> Answer:
        fault = DroppedBStream(PAGE_TOKENS // 4) if self.fault_after_hit and request.min_cached_tokens else None
        tokens, rows = list(request.prompt_ids), []
        for _ in range(new_tokens):
            logprobs = self.oracle.logprobs(tokens, dtype=torch.float64, row_format=self.row_format, fault=fault)
            rows.append(logprobs[-1])
            tokens.append(int(rows[-1].argmax()))
        output = tuple(tokens[len(request.prompt_ids) :])
        return Answer(request.name, request.prompt_ids, output, torch.stack(rows), request.min_cached_tokens, "t", 0.1)


@pytest.fixture(scope="module")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("build")


@pytest.fixture(scope="module")
def shared() -> dict[Path, Oracle]:
    return {}


@pytest.fixture
def demo(build_dir: Path, shared: dict[Path, Oracle], monkeypatch: pytest.MonkeyPatch):
    """A function that runs the demonstration with a stand-in client; gives the exit status."""

    def one_oracle(checkpoint: Path) -> Oracle:
        return shared.setdefault(checkpoint, Oracle(checkpoint))

    def run(row_format: str = "bf16", **attributes: object) -> int:
        path = command.ready_checkpoint(build_dir / "tiny", _NoProgress())
        client = type("Client", (FakeClient,), {"oracle": one_oracle(path), "row_format": row_format, **attributes})
        monkeypatch.setattr(command, "Client", client)
        monkeypatch.setattr(command, "Server", FakeServer)
        monkeypatch.setattr(command, "Oracle", one_oracle)
        monkeypatch.setattr(command, "plan_requests", lambda: REQUESTS)
        monkeypatch.setattr(command, "NEW_TOKENS", NEW_TOKENS)
        monkeypatch.setattr(command.signal, "signal", lambda *_: None)
        parser = argparse.ArgumentParser()
        command.add_parser(parser.add_subparsers())
        args = parser.parse_args(["demo", "--build-dir", str(build_dir), "--dsv4-kv-format", row_format])
        return args.func(args)

    return run


class _NoProgress:
    def add_task(self, *_: object, **__: object) -> int:
        return 0

    def advance(self, task: int) -> None: ...


@pytest.mark.parametrize("row_format", ["fp32", "bf16", "fp8_584"])
def test_right_answers_pass(demo, row_format: str, capsys: pytest.CaptureFixture[str]):
    assert demo(row_format) == 0
    printed = capsys.readouterr().out
    assert "RIGHT" in printed and "sglang_dsv4 active: stand-in" in printed and "1.00" in printed


def other_token(self: FakeClient, answer: Answer) -> Answer:
    """The last one, which no other position has read."""
    return replace(answer, output_ids=(*answer.output_ids[:-1], answer.output_ids[-1] + 1))


def other_logprob(self: FakeClient, answer: Answer) -> Answer:
    logprobs = answer.logprobs.clone()
    logprobs[-1, 7] += 1.0
    return replace(answer, logprobs=logprobs)


def no_hit(self: FakeClient, answer: Answer) -> Answer:
    return replace(answer, cached_tokens=0)


def cut_short(self: FakeClient, answer: Answer) -> Answer:
    return replace(answer, output_ids=answer.output_ids[:-1], logprobs=answer.logprobs[:-1])


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"spoil": other_token}, "generated token 2"),
        ({"spoil": other_logprob}, "log-probability is off"),
        ({"spoil": no_hit}, "from the prefix cache"),
        ({"spoil": cut_short}, "generated tokens, got 2"),
        ({"fault_after_hit": True}, "again (rows as bf16)"),
        ({"facts": None}, "says nothing about"),
    ],
)
def test_each_wrong_thing_fails(demo, attributes: dict, message: str, capsys: pytest.CaptureFixture[str]):
    assert demo(**attributes) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert message in printed and "FAILED" in printed and "RIGHT" not in printed


def test_a_dying_server_fails(demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def die(self: FakeServer) -> None:
        raise command.ServerDiedError("the server ended with status 3")

    monkeypatch.setattr(FakeServer, "check_alive", die)
    assert demo() == 1
    assert "status 3" in capsys.readouterr().out


def test_the_workload_has_what_it_promises():
    requests = plan_requests()
    lengths = sorted(len(request.prompt_ids) for request in requests)
    assert lengths[0] < 4 and lengths[-1] > 600
    for boundary in (4, 128, 256):
        assert any(abs(length - boundary) <= 1 for length in lengths)
    first_wave = [request for request in requests if request.wave == 1]
    assert len({request.prompt_ids[:3] for request in first_wave}) == len(first_wave)
    for request in requests:
        shared = max((common_prefix(request, other) for other in first_wave), default=0)
        if request.wave == 2:
            assert shared > PAGE_TOKENS and request.min_cached_tokens == PAGE_TOKENS


def common_prefix(left: PlannedRequest, right: PlannedRequest) -> int:
    pairs = zip(left.prompt_ids, right.prompt_ids, strict=False)
    with contextlib.suppress(StopIteration):
        return next(index for index, (one, other) in enumerate(pairs) if one != other)
    return min(len(left.prompt_ids), len(right.prompt_ids))


def test_text_of_a_model_cannot_drive_the_terminal():
    assert printable("a\x1b[31mb\nc") == "a·[31mb·c"
    assert len(printable("x" * 100)) < 30
