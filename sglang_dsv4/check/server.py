"""SGLang servers as child processes: started, waited for, paused, and ended with every process they have."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from sglang_dsv4 import env
from sglang_dsv4.plugin.install.checkpoint import is_unquantised, read_config

ACTIVE_MARK = "sglang_dsv4 active:"
FLAG = "--enable-dsv4-compressed-kv"
OURS, THEIRS = "ours", "sglang"
NATIVE_ROWS = "fp8_584"  # of SGLang's own cache
ROUNDED = f"{OURS}-{NATIVE_ROWS}"  # ours with these rows, where it is measured with others
# SGLang compiles kernels at its first start on a machine, for about 300 s where nothing else runs.
START_S = 900.0
TERMINATE_S = 15.0
# A server that crashed on a GPU waits 5 s for it to settle before it ends.
CRASH_S = 30.0
LOG_LINES_SHOWN = 25
# A server binds its port minutes after we chose it. From 32768 on Linux hands ports to whoever asks for any, and SGLang's own
# processes do.
PORTS = range(20000, 32000)
# The tiny checkpoint: room for every request of the demonstration at once, on any machine. Left to itself SGLang gives window
# pages a tenth of the tokens: too few for these requests, so that whether a prefix hit still finds its window would depend on
# the order in which requests end. The share of memory only has to be large: SGLang counts what other programs allocate during
# the start as the model's, and ends if that is more.
TINY_CAPACITY = (
    *("--max-total-tokens", "16384", "--swa-full-tokens-ratio", "0.5"),
    *("--max-running-requests", "16", "--mem-fraction-static", "0.5"),
)
_ERROR = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception): .+")


class ServerDiedError(RuntimeError):
    """The server ended before it was told to; the message holds the last lines of its log."""


@dataclass(frozen=True)
class Side:
    """One way to serve.

    Attributes:
        name (str): for reports, and of the log.
        is_ours (bool): whether our cache serves.
        options (tuple[str, ...]): of ``sglang.launch_server``, beyond checkpoint, address and device.
    """

    name: str
    is_ours: bool
    options: tuple[str, ...] = ()


class Server:
    """A server that ends with the ``with`` block, whatever happens inside.

    Args:
        side (Side): how to serve.
        checkpoint (Path): what to serve.
        folder (Path): for its log, and its working directory: a checkout has a folder named like a package that SGLang uses.
        device (str): ``cpu`` or ``cuda``.
        port (int | None): of 127.0.0.1; a free one by default.
    """

    def __init__(self, side: Side, checkpoint: Path, folder: Path, device: str = "cpu", port: int | None = None) -> None:
        self.side = side
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder.resolve()
        self.log = self.folder / f"{side.name}.log"
        self.command = [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint.resolve())),
            *("--host", "127.0.0.1", "--port", str(self.port), "--device", device),
            *((FLAG,) if side.is_ours else ()),
            *side.options,
        ]
        self.variables = server_variables(checkpoint, device)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self.folder.mkdir(parents=True, exist_ok=True)
        variables = self.variables | env.snapshot()
        # SGLang sends its first request to itself through the proxy that the environment names, and ends if that fails.
        for name in ("no_proxy", "NO_PROXY"):
            variables[name] = ",".join(filter(None, (variables.get(name), "127.0.0.1")))
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                cwd=self.folder,
                start_new_session=True,  # a process group of its own, ended as a whole
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None, "entered before"
        end_group(self._process)

    @property
    def group(self) -> int:
        """Its process group."""
        assert self._process is not None, "asked for inside the block"
        return self._process.pid

    def ask_to_end(self) -> None:
        """Begin to end it without waiting, so that several servers end at the same time."""
        _signal_group(self.group, signal.SIGTERM)

    def check_alive(self) -> None:
        """Raise if the server has ended.

        Raises:
            ServerDiedError: with its exit status and the last lines of its log.
        """
        assert self._process is not None, "asked for inside the block"
        status = self._process.poll()
        if status is not None:
            tail = "\n".join(self.log_lines()[-LOG_LINES_SHOWN:])
            raise ServerDiedError(f"the server ended with status {status}; the end of {self.log}:\n{tail}")

    def is_ready(self) -> bool:
        """Whether it accepts requests.

        Raises:
            ServerDiedError: it ended.
        """
        self.check_alive()
        return is_healthy(self.url)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop all its processes for the block: a server that waits for requests keeps cores busy."""
        os.killpg(self.group, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.group, signal.SIGCONT)

    def log_lines(self) -> list[str]:
        """The log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def last_error(self) -> str:
        """The last line of its log that names an error."""
        lines = [line for line in self.log_lines() if _ERROR.match(line)]
        return lines[-1] if lines else "no error in its log"


def server_variables(checkpoint: Path, device: str) -> dict[str, str]:
    """Environment variables for a server; what the environment already has wins."""
    found = {"PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        # One thread: the thread pools of several processes compete for the cores of a small machine.
        return {**found, "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    if is_unquantised(read_config(str(checkpoint))):
        # SGLang expects FP8 weights in the output projection unless told otherwise.
        found["SGLANG_OPT_FP8_WO_A_GEMM"] = "0"
    return found


def is_healthy(url: str) -> bool:
    """Whether a server accepts requests."""
    try:
        return httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def wait_until_ready(servers: Iterable[Server], limit_s: float = START_S) -> None:
    """Wait for servers that are starting.

    Raises:
        ServerDiedError: one ended instead.
        TimeoutError: one was not ready in time; names it and its log.
    """
    waiting, deadline = list(servers), time.monotonic() + limit_s
    while waiting := [server for server in waiting if not server.is_ready()]:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"server {waiting[0].side.name}: expected ready within {limit_s:.0f} s; its log is {waiting[0].log}"
            )
        time.sleep(0.25)


@contextmanager
def naming_the_dead(servers: Sequence[Server], limit_s: float = CRASH_S) -> Iterator[None]:
    """Where a connection is lost because a server crashed, say which one and how; a crashed server takes a while to end.

    Raises:
        ServerDiedError: one of the servers ended.
    """
    try:
        yield
    except (httpx.HTTPError, OSError):
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            for server in servers:
                server.check_alive()
            time.sleep(0.25)
        raise


def active_line(lines: Iterable[str]) -> str | None:
    """The line in which the plug-in says that it is active, without the logger's prefix."""
    return next((line[line.index(ACTIVE_MARK) :] for line in lines if ACTIVE_MARK in line), None)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now, from `PORTS`.

    Raises:
        OSError: none of a hundred was.
    """
    tried = random.SystemRandom().sample(PORTS, 100)
    for port in tried:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"port: expected a free one among {len(tried)} of {PORTS}, got none")


def processes(group: int) -> list[psutil.Process]:
    """Processes of a group that have not ended; an ended one may remain as a zombie."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def group_bytes(group: int) -> int:
    """Memory of a process group; each shared page is divided among the processes that share it."""
    total = 0
    for process in processes(group):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def end_group(process: subprocess.Popen[Any], patience_s: float = TERMINATE_S) -> None:
    """End a process and all others of its group: first asked to, then killed. ``process`` leads its group."""
    _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        process.poll()
        if not processes(process.pid):
            return
        time.sleep(0.05)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(group, number)
