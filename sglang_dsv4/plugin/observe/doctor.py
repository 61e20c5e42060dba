"""``python -m sglang_dsv4 doctor``: what is here, and what would run."""

import argparse
import platform
import warnings
from dataclasses import asdict, replace
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from dsv4_kernels.layout import ROW_FORMATS
from sglang_dsv4 import __version__
from sglang_dsv4.attention import find_capabilities, name_attention
from sglang_dsv4.attention.device import Device
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install import contract, versions
from sglang_dsv4.plugin.install.machine import check_device
from sglang_dsv4.plugin.install.portable.capabilities import Capabilities

_PACKAGES = (
    "torch",
    "triton",
    "sglang",
    "transformers",
    "flashinfer-python",
    "sgl-flash-mla",
    "sglang-kernel",
    "sgl-deep-gemm",
    "tilelang",
)
_SOME_HEADS = 64


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "doctor",
        help="print versions, capabilities, SGLang's contract, and what would run",
        description="Print the versions of the packages, what this machine can do, every SGLang name that the plug-in touches, "
        "the operations and the attention that would run, and whether the plug-in would refuse to start.",
    )
    parser.add_argument(
        "--as",
        dest="machine",
        metavar="DEVICE",
        default=None,
        help="Answer for another machine with the same packages: cpu, or a GPU as in sm_80.",
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


def _capabilities(capabilities: Capabilities, title: str) -> Table:
    table = Table("capability", "found", title=title, title_justify="left")
    for name, value in asdict(capabilities).items():
        table.add_row(name, "none" if value is None else str(value))
    return table


def _contract() -> tuple[Table, list[str]]:
    table = Table(title="SGLang names this plug-in touches", title_justify="left")
    for column in ("name", "use", "state"):
        table.add_column(column, overflow="fold")
    missing = []
    for name in contract.names_of(versions.installed()):
        found = name.is_found()
        table.add_row(name.path, name.use, "found" if found else "MISSING")
        if not found:
            missing.append(name.path)
    return table, missing


def _portable(capabilities: Capabilities) -> Table:
    from sglang_dsv4.plugin.install.portable.install import choose
    from sglang_dsv4.plugin.install.portable.table import portable_ops

    table = Table("op", "replaces", "because", title="Portable ops", title_justify="left")
    for op in choose(capabilities, portable_ops(versions.installed())):
        table.add_row(op.name, op.target, op.reason)
    return table


def _attention(capabilities: Capabilities) -> Table:
    table = Table("rows", "attention", "because", title="Attention, 64 query heads", title_justify="left")
    sm, device = capabilities.sm, torch.device(capabilities.device)
    there = Device(device, None if sm is None else divmod(sm, 10), 0)
    for row_format in ROW_FORMATS:
        here = find_capabilities(torch.device("cpu"), row_format, _SOME_HEADS)
        table.add_row(row_format, *name_attention(None, replace(here, device=there)))
    return table


def kernels(capabilities: Capabilities) -> str:
    """Whose kernels would fill the cache and choose its entries."""
    if not capabilities.has_triton_gpu:
        return "torch"
    takes_long = capabilities.sm == 90 and capabilities.has_deep_gemm
    return "triton, scores of long prefills by DeepGEMM" if takes_long else "triton"


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 1 where the plug-in would refuse to start."""
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    capabilities, title = Capabilities.detect(device), "This machine"
    if args.machine is not None:
        try:
            capabilities = capabilities.on(args.machine)
        except UnsupportedError as error:
            console.print(f"--as: {error}", soft_wrap=True)
            return 1
        title, device = f"{args.machine}, with the packages of this machine", args.machine
    # What SGLang lacks for other models, it says of each of its modules when that is imported.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"sglang\.")
    console.print(_versions())
    console.print(_capabilities(capabilities, title))
    try:
        _print_sglang(console, capabilities)
    except UnsupportedError as error:
        console.print(f"Would refuse to start: {error}", soft_wrap=True)
        return 1
    if capabilities.sm is not None:
        console.print("CUDA graphs: with attention flashinfer or flashmla; eager needs --disable-cuda-graph")
    console.print(
        f"Would run on {device}: CompressedKVCache, kernels {kernels(capabilities)}, attention and portable ops as listed",
        soft_wrap=True,
    )
    return 0


def _print_sglang(console: Console, capabilities: Capabilities) -> None:
    """What SGLang is here, and what would run.

    Raises:
        UnsupportedError: the plug-in would refuse to start.
    """
    versions.check_installed()
    table, missing = _contract()
    for part in (table, _portable(capabilities), _attention(capabilities)):
        console.print(part)
    if missing:
        raise UnsupportedError(f"missing in SGLang: {', '.join(missing)}")
    check_device(capabilities.device, None if capabilities.sm is None else divmod(capabilities.sm, 10))
