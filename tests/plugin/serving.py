"""Servers of the tests, requests to them, and their answers."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch

from sglang_dsv4.check.server import TINY_CAPACITY, Server, Side, is_healthy, processes
from tests.plugin.warm import COPIES, Program, Warm

NEW_TOKENS = 9
START_S = 240


def prompt(length, salt=0):
    generator = torch.Generator().manual_seed(1000 * salt + length)
    return torch.randint(8, 264, (length,), generator=generator).tolist()


@contextmanager
def serving(
    warm: Warm,
    checkpoint: Path,
    arguments: tuple[str, ...],
    *,
    port: int | None = None,
    variables: dict[str, str] | None = None,
    before: str = COPIES,
) -> Iterator[Server]:
    """A server whose command runs in a copy of a process with SGLang imported. Killed at the end, as a crash would."""
    server = Server(Side("unused", True, (*TINY_CAPACITY, *arguments)), checkpoint, Path("unused"), port=port)
    group, server.log = warm.start(Program(server.command[1:], variables or {}, before=before))
    server.pid = group
    try:
        deadline = time.monotonic() + START_S
        while not is_healthy(server.url):
            assert is_running(group) and time.monotonic() < deadline, server.log_lines()[-20:]
            time.sleep(0.2)
        yield server
    finally:
        os.killpg(group, signal.SIGKILL)


def running_in(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    return [process.pid for process in processes(group)]


def wait_until_ended(group: int, patience_s: float = 60) -> None:
    """Wait until no process of a group runs.

    Raises:
        AssertionError: some still do; they are named.
    """
    deadline = time.monotonic() + patience_s
    while left := running_in(group):
        assert time.monotonic() < deadline, f"still running after {patience_s} s: {left}"
        time.sleep(0.1)


def wait_for_log(server: Server, text: str, times: int = 1, patience_s: float = 120) -> None:
    """Wait until a line of the server's log with ``text`` has come ``times`` times."""
    deadline = time.monotonic() + patience_s
    while sum(text in line for line in server.log_lines()) < times:
        assert time.monotonic() < deadline, server.log_lines()[-20:]
        time.sleep(0.05)


def is_running(process: int) -> bool:
    """Whether a child of the warm process runs; once ended it is a zombie, since nobody waits for it."""
    state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def request_body(input_ids, new_tokens):
    """Every request asks for the same kind of log-probabilities: SGLang 0.5.17's scheduler ends the server when one
    decode batch mixes requests with and without ``token_ids_logprob``."""
    return {
        "input_ids": input_ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        "return_logprob": True,
        "token_ids_logprob": list(range(264)),
    }


def generate(server, input_ids, new_tokens=NEW_TOKENS):
    answer = post(server, "generate", request_body(input_ids, new_tokens))
    return read(answer.json())


def post(server, path, body):
    answer = httpx.post(f"{server.url}/{path}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer


def read(answer):
    """The generated tokens, the log-probabilities behind each, and the prompt tokens that came from the prefix cache."""
    meta = answer["meta_info"]
    tokens = [token for _, token, _ in meta["output_token_logprobs"]]
    rows = [[value for value, _, _ in row] for row in meta["output_token_ids_logprobs"]]
    return tokens, torch.tensor(rows), meta["cached_tokens"]
