"""What a server needs of the machine: its device, port, attention and dtype."""

import socket
from collections.abc import Iterator

import torch

from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.spec import CacheSpec

MIN_CAPABILITY = (8, 0)  # bf16 on tensor cores


def found_device(named: str | None) -> str:
    """The device that is meant: the one that was named, else a GPU where there is one."""
    return named or ("cuda" if torch.cuda.is_available() else "cpu")


def compute_capability(device: str) -> tuple[int, int] | None:
    """Of an NVIDIA GPU; None for another device, or where the driver finds none."""
    if device.partition(":")[0] != "cuda" or torch.version.cuda is None:
        return None
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def check_device(device: str, capability: tuple[int, int] | None) -> None:
    """Refuse devices on which the plug-in cannot run.

    Args:
        device (str): as ``--device`` names it.
        capability (tuple[int, int] | None): of `compute_capability`.

    Raises:
        UnsupportedError: names the device and what works.
    """
    kind = device.partition(":")[0]
    if kind == "cpu":
        return
    if kind != "cuda":
        raise UnsupportedError(
            f"--device {device}: expected cpu or cuda; with --enable-dsv4-compressed-kv HIP, NPU and XPU were never run"
        )
    if capability is None:
        raise UnsupportedError(f"--device {device}: expected an NVIDIA GPU, torch finds none")
    if capability < MIN_CAPABILITY:
        found, least = (f"SM{major}{minor}" for major, minor in (capability, MIN_CAPABILITY))
        raise UnsupportedError(f"--device {device}: expected {least} or later, got {found}")


def check_attention(name: str | None, spec: CacheSpec, device: str, num_heads: int) -> str:
    """Refuse an attention that is not possible, before the model is loaded.

    Args:
        name (str | None): what was asked for; None takes the fastest that is possible.
        spec (CacheSpec): the cache's.
        device (str): where it will be.
        num_heads (int): of `checkpoint.handed_heads`.

    Returns:
        str: the attention that will be used.

    Raises:
        UnsupportedError: names the attention and why.
    """
    from sglang_dsv4.attention import choose_attention, find_capabilities

    try:
        chosen, _ = choose_attention(name, find_capabilities(torch.device(device), spec.row_format, num_heads))
    except ValueError as error:
        raise UnsupportedError(f"--dsv4-attention: {error}") from error
    return chosen.name


def check_dtype(dtype: str, attention: str) -> None:
    """Refuse activations that the chosen attention does not take: the eager one computes in fp32, too, all others in bf16.

    Args:
        dtype (str): as ``--dtype`` names it; ``auto`` passes, and is checked again when SGLang has resolved it.
        attention (str): of `check_attention`.

    Raises:
        UnsupportedError: names both.
    """
    allowed = ("bfloat16", "float32") if attention == "eager" else ("bfloat16",)
    if {"float": "float32"}.get(dtype, dtype) not in ("auto", *allowed):
        raise UnsupportedError(f"--dtype {dtype}: expected {' or '.join(allowed)} with attention {attention}")


def check_port(host: str, port: int) -> None:
    """Refuse a port that another server holds, before the model is loaded.

    Raises:
        UnsupportedError: names the address and the system's reason.
    """
    reasons = list(_bind_failures(host, port))
    if reasons:
        raise UnsupportedError(f"--port {port}: expected a free port on {host}, but it is taken: {reasons[0]}")


def _bind_failures(host: str, port: int) -> Iterator[str]:
    # An unusable host name is SGLang's to report; here only the port matters.
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        return
    with socket.socket(family, kind, proto) as probe:
        # A server killed a moment ago leaves connections in TIME_WAIT; they must not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            yield str(error)
