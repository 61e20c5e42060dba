"""The two sides of a comparison: the same SGLang, checkpoint and options, with our cache and with SGLang's own."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from sglang_dsv4.check.compare.client import StreamError
from sglang_dsv4.check.demo.server import Server
from sglang_dsv4.plugin.install.refusals import is_unquantised

# SGLang compiles kernels at its first start on a machine, for about 300 s where nothing else runs.
START_S = 900.0
# A server that crashed on a GPU lets it settle for 5 s before it ends.
CRASH_S = 30.0
OURS, THEIRS = "ours", "sglang"
NATIVE_ROWS = "fp8_584"  # of SGLang's own cache
ROUNDED = f"{OURS}-{NATIVE_ROWS}"  # ours with these rows, where it is measured with others
FLAG = "--enable-dsv4-compressed-kv"
_ERROR = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception): .+")
# What a server logs when it sizes its pools: bytes of a token, and GiB that are there; SGLang's own line, and ours on a GPU.
_SIZING = (
    re.compile(r"bytes_per_full_token=(?P<token>[\d.]+), available_bytes=(?P<all>[\d.]+) GB"),
    re.compile(r"tokens fit into (?P<all>[\d.]+) GiB \((?P<token>[\d.]+) bytes a token"),
)


@dataclass(frozen=True)
class Side:
    """One way to serve.

    Attributes:
        name (str): for reports.
        is_ours (bool): whether our cache serves.
        options (tuple[str, ...]): of ``sglang.launch_server``, beyond checkpoint, address and device.
    """

    name: str
    is_ours: bool
    options: tuple[str, ...]


class SideServer(Server):
    """The server of one side; ends with the ``with`` block.

    Args:
        side (Side): which.
        checkpoint (Path): what to serve.
        folder (Path): for its log, and where it runs: the folder of a checkout has one named as a package that SGLang uses.
        device (str): ``cpu`` or ``cuda``.
    """

    def __init__(self, side: Side, checkpoint: Path, folder: Path, device: str) -> None:
        super().__init__(checkpoint, folder.resolve() / f"{side.name}.log", ())
        self.side = side
        self._checkpoint = checkpoint
        self.folder = folder.resolve()
        self._device = device
        model_at = self._command.index("--model-path") + 1
        head = [*self._command[:model_at], str(checkpoint.resolve())]
        flag = (FLAG,) if side.is_ours else ()
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--device", device]
        self._command = [*head, *address, *flag, *side.options]

    def variables(self) -> dict[str, str]:
        """On a GPU SGLang must not be told that it is on a CPU, but that the output projection's weights are not FP8, where
        they are not: it expects them so unless told otherwise."""
        found = super().variables()
        if self._device == "cpu":
            return found
        on_gpu = {"PYTHONUNBUFFERED": found["PYTHONUNBUFFERED"]}
        if is_unquantised(str(self._checkpoint)):
            on_gpu["SGLANG_OPT_FP8_WO_A_GEMM"] = "0"
        return on_gpu

    def is_ready(self) -> bool:
        """Whether it takes requests.

        Raises:
            ServerDiedError: it ended.
        """
        self.check_alive()
        try:
            reply = httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False)
        except httpx.TransportError:
            return False
        return reply.status_code == httpx.codes.OK

    @contextmanager
    def paused(self) -> Iterator[None]:
        """All its processes stand still: a server that waits for requests keeps cores busy with that."""
        os.killpg(self.group, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.group, signal.SIGCONT)

    def last_error(self) -> str:
        """The last line of its log that names an error."""
        lines = [line for line in self.log_lines() if _ERROR.match(line)]
        return lines[-1] if lines else "no error in its log"


def starting(count: int, folder: Path, device: str) -> str:
    """What to say before servers start: the wait may be long."""
    patience = ""
    if device == "cuda":
        patience = "; SGLang compiles for minutes at a first start, most of all for V4-Flash's width"
    return f"Starting {count} servers, logs in {folder}{patience}"


def wait_until_ready(servers: Iterable[SideServer], limit_s: float = START_S) -> None:
    """Wait for servers that are starting.

    Raises:
        ServerDiedError: one ended instead.
        TimeoutError: one did neither in time; names it and its log.
    """
    waiting, deadline = list(servers), time.monotonic() + limit_s
    while waiting:
        waiting = [server for server in waiting if not server.is_ready()]
        if waiting and time.monotonic() > deadline:
            raise TimeoutError(
                f"server {waiting[0].side.name}: expected ready within {limit_s:.0f} s; its log is {waiting[0].log}"
            )
        time.sleep(0.25)


@contextmanager
def naming_the_dead(servers: Sequence[SideServer], limit_s: float = CRASH_S) -> Iterator[None]:
    """Where a connection is lost because a server crashed, say which, and how; it takes a while to end.

    Raises:
        ServerDiedError: one of the servers ended.
    """
    try:
        yield
    except (httpx.HTTPError, OSError, StreamError):
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            for server in servers:
                server.check_alive()
            time.sleep(0.25)
        raise


def facts_of(server: SideServer) -> dict[str, Any]:
    """What a server says about its pools, by itself and in its log.

    Returns:
        dict[str, Any]: ``tokens_that_fit``; ``memory``, SGLang's own figures in GB; ``sizing_bytes_per_token`` by which it
            sized its pools (window rows at their share, state per request left out) and ``sizing_gb``, both None where the
            number of tokens was given; with our cache ``pools``, bytes by pool.
    """
    info = httpx.get(f"{server.url}/server_info", timeout=60, trust_env=False)
    state = info.raise_for_status().json()["internal_states"][0]
    lines = server.log_lines()
    sizing = [found for line in lines for pattern in _SIZING if (found := pattern.search(line))]
    facts: dict[str, Any] = {
        "options": [*server.side.options],
        "tokens_that_fit": state["memory_usage"]["token_capacity"],
        "memory": state["memory_usage"],
        "sizing_bytes_per_token": float(sizing[-1]["token"]) if sizing else None,
        "sizing_gb": float(sizing[-1]["all"]) if sizing else None,
    }
    ours = state.get("sglang_dsv4")
    if (ours is not None) != server.side.is_ours:
        raise ValueError(
            f"server {server.side.name}: expected our cache {'on' if server.side.is_ours else 'off'}, and it is not"
        )
    if ours is not None:
        report = ours["report"]
        facts |= {
            "attention": ours["attention"],
            "kernels": ours["kernels"],
            "pools": report["bytes_by_pool"],
            "row_format": report["row_format"],
            "pool_bytes_per_token": report["total_bytes"] / report["max_tokens"],
        }
    return facts


def free_bytes(device: str) -> int:
    """Bytes of a GPU that nobody holds; 0 on a CPU."""
    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else 0


def same_share(fraction: float, at_first: int, now: int) -> float:
    """``--mem-fraction-static`` of a server that starts beside others, so that its pools get as much as the first one's.

    SGLang takes the fraction of what is free when it starts.

    Args:
        fraction (float): of the first server.
        at_first (int): bytes that were free when it started.
        now (int): bytes free now.

    Raises:
        ValueError: there is not as much left.
    """
    if not now:
        return fraction
    share = fraction * at_first / now
    if share > 0.95:
        raise ValueError(f"--mem-fraction {fraction}: expected room for as much again, got {now >> 20} MiB free; choose less")
    return share


def start_in_turn(sides: Iterable[Side], fraction: float, device: str, enter: Callable[[Side], SideServer]) -> list[SideServer]:
    """Start sides one after the other, each with the same bytes for its pools; ``enter`` starts one."""
    servers: list[SideServer] = []
    at_first = free_bytes(device)
    for side in sides:
        share = same_share(fraction, at_first, free_bytes(device))
        options = (*side.options, "--mem-fraction-static", f"{share:.4f}")
        server = enter(Side(side.name, side.is_ours, options))
        wait_until_ready([server])
        servers.append(server)
    return servers


def start_at_once(sides: Iterable[Side], tokens: int, enter: Callable[[Side], SideServer]) -> list[SideServer]:
    """Start sides at the same time with pools of so many tokens; ``enter`` starts one.

    The share of memory only has to be large: SGLang counts what others take during a start as its own.
    """
    pool = ("--max-total-tokens", str(tokens), "--mem-fraction-static", "0.8")
    servers = [enter(Side(side.name, side.is_ours, (*side.options, *pool))) for side in sides]
    wait_until_ready(servers)
    return servers
