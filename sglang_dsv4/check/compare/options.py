"""What the commands that start two servers have in common."""

import argparse
import signal
from pathlib import Path

import torch
from rich.console import Console

from sglang_dsv4.check.demo.server import leave


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add where servers run, and with what."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--options", default="", help="further options of both sides, as one string")
    parser.add_argument("--our-options", default="", help="further options of ours, as one string")
    parser.add_argument(
        "--build-dir", type=Path, default=Path("build"), help="for the checkpoint and logs (default: %(default)s)"
    )


def begin(args: argparse.Namespace) -> tuple[Console, str]:
    """Where to print, and the device; from here on a ``kill`` ends the servers too."""
    signal.signal(signal.SIGTERM, leave)
    return Console(width=160), args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_model(model: Path | None) -> None:
    """Refuse a checkpoint that is not there.

    Raises:
        ValueError: names the folder.
    """
    if model is not None and not (model / "config.json").is_file():
        raise ValueError(f"--model {model}: expected a folder with config.json, got none")
