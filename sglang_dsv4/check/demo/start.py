"""What must be there before the first request: a checkpoint, and a server that takes requests."""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sglang_dsv4.check.demo.client import Client
from sglang_dsv4.check.demo.server import Server
from sglang_dsv4.tiny import TinySpec, holds_checkpoint, write_tiny_checkpoint

START_S = 240.0


def steps_progress(console: Console) -> Progress:
    """A bar for each task: what it is, how much of it is done, and for how long it has run."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def ready_checkpoint(path: Path, progress: Progress) -> Path:
    """The tiny checkpoint, written unless it is there."""
    spec = TinySpec()
    task = progress.add_task("checkpoint", total=1)
    if not holds_checkpoint(path, spec):
        write_tiny_checkpoint(path, spec)
    progress.advance(task)
    return path


def wait_until_healthy(server: Server, client: Client, progress: Progress) -> None:
    """Wait for the server to take requests.

    Raises:
        ServerDiedError: it ended instead.
        TimeoutError: it did neither within `START_S` seconds.
    """
    task = progress.add_task("server starts", total=1)
    deadline = time.monotonic() + START_S
    while not client.is_healthy():
        server.check_alive()
        if time.monotonic() > deadline:
            raise TimeoutError(f"the server was not ready after {START_S:.0f} s; its log is {server.log}")
        time.sleep(0.25)
    progress.advance(task)
