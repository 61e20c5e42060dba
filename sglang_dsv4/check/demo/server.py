"""One SGLang server as a child process."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType

from sglang_dsv4 import env

ACTIVE_MARK = "sglang_dsv4 active:"
TERMINATE_S = 15.0
LOG_LINES_SHOWN = 25
# A server takes its port minutes after it was chosen. Linux gives ports from 32768 on to whoever asks for any, and SGLang's
# own processes do.
PORTS = range(20000, 32000)
# Enough for every request of the demonstration at once, small enough for any machine. The share of window pages is
# SGLang's to choose, and it would choose a tenth: too few for the requests, and windows that a prefix hit needs would
# be gone by then, or not, depending on the order in which requests ended. The share of memory only has to be large: SGLang
# counts what other programs take during the start as the model's, and ends if that is more.
CAPACITY = (
    "--max-total-tokens",
    "16384",
    "--swa-full-tokens-ratio",
    "0.5",
    "--max-running-requests",
    "16",
    "--mem-fraction-static",
    "0.5",
)


class ServerDiedError(RuntimeError):
    """The server ended before it was told to; the message holds the last lines of its log."""


class Server:
    """A server that ends with the ``with`` block, whatever happens inside.

    Args:
        checkpoint (Path): what to serve.
        log (Path): where its output goes; overwritten.
        arguments (tuple[str, ...]): further arguments of ``sglang.launch_server``.
        port (int | None): of 127.0.0.1; a free one by default.
    """

    def __init__(self, checkpoint: Path, log: Path, arguments: tuple[str, ...], port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._command = [
            sys.executable,
            "-m",
            "sglang.launch_server",
            "--model-path",
            str(checkpoint),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--device",
            "cpu",
            "--enable-dsv4-compressed-kv",
            *CAPACITY,
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.folder: Path | None = None  # where it runs; None: where we do

    def variables(self) -> dict[str, str]:
        """Environment variables for the server, unless the environment has them."""
        # One thread: the pools of several processes fight over the cores of a small machine.
        return {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def __enter__(self) -> "Server":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        variables = self.variables() | env.snapshot()
        # SGLang sends its first request to itself through the proxy that the environment names, and ends if that fails.
        for name in ("no_proxy", "NO_PROXY"):
            variables[name] = ",".join(filter(None, (variables.get(name), "127.0.0.1")))
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                cwd=self.folder,
                start_new_session=True,  # its own process group, ended as a whole
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        assert self._process is not None
        end_group(self._process)

    def ask_to_end(self) -> None:
        """Begin to end it, without waiting: several servers then end at the same time."""
        _signal_group(self.group, signal.SIGTERM)

    @property
    def group(self) -> int:
        """Its process group."""
        assert self._process is not None
        return self._process.pid

    def check_alive(self) -> None:
        """Raise if the server has ended.

        Raises:
            ServerDiedError: with its exit status and the last lines of its log.
        """
        assert self._process is not None
        status = self._process.poll()
        if status is not None:
            tail = "\n".join(self.log_lines()[-LOG_LINES_SHOWN:])
            raise ServerDiedError(f"the server ended with status {status}; the end of {self.log}:\n{tail}")

    def log_lines(self) -> list[str]:
        """The log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()


def active_line(lines: list[str]) -> str | None:
    """The line by which the plug-in says that it runs, without the logger's prefix."""
    return next((line[line.index(ACTIVE_MARK) :] for line in lines if ACTIVE_MARK in line), None)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now, of `PORTS`.

    Raises:
        OSError: none of many was.
    """
    tried = random.SystemRandom().sample(PORTS, 100)
    for port in tried:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"port: expected a free one among {len(tried)} of {PORTS}, got none")


def end_group(process: subprocess.Popen[bytes], patience_s: float = TERMINATE_S) -> None:
    """End a process and all others of its group: first asked to, then forced to. ``process`` leads its group."""
    _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        process.poll()
        if not _signal_group(process.pid, 0):
            return
        time.sleep(0.05)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(group: int, number: int) -> bool:
    """Whether the group still had a process to signal."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def leave(number: int, frame: FrameType | None) -> None:
    """Handle a signal by an exception, which passes through the `with` blocks that own servers."""
    del frame
    raise SystemExit(128 + number)
