"""``python -m sglang_dsv4 doctor``: what is here, and what would run."""

import argparse
import platform
from dataclasses import asdict
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from sglang_dsv4 import __version__
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin import contract
from sglang_dsv4.plugin.portable.capabilities import Capabilities

_PACKAGES = (
    "torch",
    "triton",
    "sglang",
    "transformers",
    "flashinfer-python",
    "sgl-flash-mla",
    "sglang-kernel",
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "doctor", help="print versions, capabilities, SGLang's contract, and what would run"
    )
    parser.set_defaults(func=run)


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> Table:
    table = Table("package", "version", title="Versions", title_justify="left")
    table.add_row("python", platform.python_version())
    table.add_row("sglang-dsv4", __version__)
    for package in _PACKAGES:
        table.add_row(package, _installed(package))
    return table


def _capabilities(capabilities: Capabilities) -> Table:
    table = Table("capability", "found", title="This machine", title_justify="left")
    for name, value in asdict(capabilities).items():
        table.add_row(name, "none" if value is None else str(value))
    return table


def _contract() -> tuple[Table, list[str]]:
    table = Table(
        "name", "use", "state", title="SGLang names this plug-in touches", title_justify="left"
    )
    missing = []
    for name in contract.CONTRACT:
        found = name.is_found()
        table.add_row(name.path, name.use, "found" if found else "MISSING")
        if not found:
            missing.append(name.path)
    return table, missing


def _portable(capabilities: Capabilities) -> Table:
    from sglang_dsv4.plugin.portable.install import choose

    table = Table("op", "replaces", "because", title="Portable ops", title_justify="left")
    for op in choose(capabilities):
        table.add_row(op.name, op.target, op.reason)
    return table


def run(_: argparse.Namespace) -> int:
    """Print the report; returns 1 where the plug-in would refuse to start."""
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    capabilities = Capabilities.detect(device)
    console.print(_versions())
    console.print(_capabilities(capabilities))
    try:
        contract.check_version(contract.installed_version())
    except UnsupportedError as error:
        console.print(f"Would refuse to start: {error}", soft_wrap=True)
        return 1
    table, missing = _contract()
    console.print(table)
    console.print(_portable(capabilities))
    if missing:
        console.print(
            f"Would refuse to start: missing in SGLang: {', '.join(missing)}", soft_wrap=True
        )
        return 1
    if device != "cpu":
        console.print(
            "Would refuse to start on this device: serving is supported with --device cpu so far"
        )
        return 1
    console.print("Would run: CompressedKVCache, attention eager on cpu, portable ops as listed")
    return 0
