"""The servers of a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_dsv4.check.server import Server, Side, wait_until_ready
from sglang_dsv4.check.server_facts import facts_of


@dataclass(frozen=True)
class Way:
    """How a server computes: with CUDA graphs or without, and in chunks of how many tokens."""

    mode: str
    chunk: int

    @property
    def name(self) -> str:
        """Such as ``graph-512``."""
        return f"{self.mode}-{self.chunk}"

    def options(self) -> tuple[str, ...]:
        """For SGLang."""
        eager = ("--disable-cuda-graph",) if self.mode == "eager" else ()
        return ("--chunked-prefill-size", str(self.chunk), *eager)


def read_way(text: str) -> Way:
    """The way of that name.

    Raises:
        ValueError: there is none.
    """
    mode, _, chunk = text.partition("-")
    if mode not in ("graph", "eager") or not chunk.isdigit() or int(chunk) % 256 or not int(chunk):
        raise ValueError(f"--ways: expected graph-N or eager-N, N a multiple of 256, got {text!r}")
    return Way(mode, int(chunk))


def starting(count: int, folder: Path, device: str) -> str:
    """What to say before servers start: the wait may be long."""
    patience = "; at its first start SGLang compiles for minutes, longest for V4-Flash's width" if device == "cuda" else ""
    return f"Starting {count} servers, logs in {folder}{patience}"


class Fleet:
    """Servers that end with the ``with`` block, all at the same time.

    Args:
        checkpoint (Path): what they serve.
        folder (Path): for their logs, and their answers.
        device (str): ``cpu`` or ``cuda``.
    """

    def __init__(self, checkpoint: Path, folder: Path, device: str) -> None:
        self._checkpoint = checkpoint
        self.folder = folder
        self._device = device
        self._running: list[Server] = []
        self.facts: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        self.end(self._running)

    def launch(self, sides: Sequence[Side]) -> None:
        """Let servers start, without waiting for them."""
        for side in sides:
            self._running.append(Server(side, self._checkpoint, self.folder, self._device).__enter__())

    def start(self, sides: Sequence[Side]) -> list[Server]:
        """Start those servers that were not launched, all at the same time, and wait for all.

        Raises:
            ServerDiedError: one ended.
            TimeoutError: one was not ready in time.
        """
        launched = [server.side for server in self._running]
        self.launch([side for side in sides if side not in launched])
        servers = [server for server in self._running if server.side in sides]
        servers.sort(key=lambda server: sides.index(server.side))
        wait_until_ready(servers)
        for server in servers:
            self.facts[server.side.name] = facts_of(server)
        return servers

    def end(self, servers: Sequence[Server]) -> None:
        """End some servers; one that has ended may be among them."""
        ending = [server for server in servers if server in self._running]
        for server in ending:
            server.ask_to_end()
        for server in ending:
            self._running.remove(server)
            server.__exit__()
