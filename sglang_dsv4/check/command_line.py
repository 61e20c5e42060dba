"""What the commands that start servers have in common: options, checks before anything starts, how a failure is shown."""

import argparse
import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from sglang_dsv4.check.server import Server, ServerDiedError, wait_until_ready

# Options by what must be true of them before the first server starts.
_WRITTEN, _CHECKPOINTS, _FILES = ("json", "plot"), ("model", "runtime"), ("answers",)
_POSITIVE = ("requests", "longest", "concurrency", "minutes", "at_once", "rounds", "tokens")
PICTURES = (".png", ".svg", ".pdf")


def add_build_dir(parser: argparse.ArgumentParser) -> None:
    """Add ``--build-dir``."""
    parser.add_argument(
        "--build-dir", type=Path, metavar="DIR", default=Path("build"), help="for checkpoints and logs (default: %(default)s)"
    )


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add where two sides run, and with what."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--options", default="", help="further options of both sides, as one string")
    parser.add_argument("--our-options", default="", help="further options of our side, as one string")
    add_build_dir(parser)


def device_of(args: argparse.Namespace) -> str:
    """``cpu`` or ``cuda``: what was asked for, or a GPU where there is one."""
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse at once what would otherwise fail after minutes of work; options that a command does not have are ignored.

    Raises:
        ValueError: names the option, what was expected, and what was given.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in given.keys() & set(_POSITIVE):
        if not given[name] > 0:
            raise ValueError(f"{_flag(name)}: expected more than 0, got {given[name]}")
    if given.get("exact", 0) < 0:
        raise ValueError(f"--exact: expected 0 or more, got {given['exact']}")
    if given.get("device") == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a CUDA device, found none; nothing was started")
    _check_paths(given)


def _check_paths(given: dict[str, Any]) -> None:
    for name in given.keys() & set(_CHECKPOINTS):
        if not (given[name] / "config.json").is_file():
            raise ValueError(f"{_flag(name)} {given[name]}: expected a folder with config.json, got none")
    for name in given.keys() & set(_FILES):
        if not given[name].is_file():
            raise ValueError(f"{_flag(name)} {given[name]}: expected a file, got none")
    for name in given.keys() & set(_WRITTEN):
        folder = given[name].parent
        if given["build_dir"] in (folder, *folder.parents):
            folder.mkdir(parents=True, exist_ok=True)
        if given[name].is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{_flag(name)} {given[name]}: expected a file in a folder that exists and can be written to")
    if "plot" in given and (given["plot"].suffix not in PICTURES or importlib.util.find_spec("matplotlib") is None):
        raise ValueError(f"--plot {given['plot']}: expected matplotlib and a name that ends in {', '.join(PICTURES)}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def run_guarded(work: Callable[[], int], console: Console, about: str = "") -> int:
    """Do the work of a command; a failure that a user can cause is one line, and the exit status 1.

    From here on a ``kill`` ends the servers too: as an exception it passes through the ``with`` blocks that own them.

    Args:
        work (Callable[[], int]): gives the exit status.
        console (Console): where a failure is shown.
        about (str): put before it, such as the server's address.
    """
    signal.signal(signal.SIGTERM, _leave)
    try:
        return work()
    except httpx.HTTPError as error:
        message = f"{type(error).__name__}: {error}"  # some have no text of their own
    except (ServerDiedError, ValueError, OSError) as error:
        message = str(error)
    console.print(Text(f"FAILED  {about}{message}", style="bold red"))
    return 1


def _leave(number: int, frame: object) -> None:
    del frame
    raise SystemExit(128 + number)


@contextmanager
def started(server: Server, progress: Progress) -> Iterator[Server]:
    """Start a server for the block, and show the wait for it."""
    with server:
        task = progress.add_task("server starts", total=1)
        wait_until_ready([server])
        progress.advance(task)
        yield server


def steps_progress(console: Console) -> Progress:
    """A bar for each task: what it is, how much of it is done, and for how long it has run."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)
