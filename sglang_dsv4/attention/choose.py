"""Which attention a cache gets, and why."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from sglang_dsv4.attention.base import Attention
from sglang_dsv4.attention.device import Device, device_of
from sglang_dsv4.attention.eager import EagerAttention
from sglang_dsv4.attention.row_list_kinds import FixedShape
from sglang_dsv4.cache import CompressedKVCache, ExternalKVCache
from sglang_dsv4.errors import UnsupportedError

NAMES = ("eager", "flashinfer", "flashmla")
_FLASHMLA = "sgl-flash-mla"
FIRST_FLASHINFER = (0, 6, 18)  # head_dim_kpe=0: earlier kernels begin their sums there, with whatever was in the registers


@dataclass(frozen=True)
class Capabilities:
    """What a choice depends on.

    Attributes:
        device (Device): where the cache lives.
        row_format (str): of the cache's rows.
        num_heads (int): query heads.
        flashinfer (str | None): installed version of flashinfer-python.
        flashmla (str | None): installed version of sgl-flash-mla.
    """

    device: Device
    row_format: str
    num_heads: int
    flashinfer: str | None
    flashmla: str | None


def find_capabilities(device: torch.device, row_format: str, num_heads: int) -> Capabilities:
    """Look at the device and at the installed packages; arguments as the fields of `Capabilities`."""
    return Capabilities(device_of(device), row_format, num_heads, installed("flashinfer-python"), installed(_FLASHMLA))


def name_attention(name: str | None, capabilities: Capabilities) -> tuple[str, str]:
    """Choose an implementation without loading it.

    Args:
        name (str | None): of `NAMES`; None takes the fastest that is possible.
        capabilities (Capabilities): what there is.

    Returns:
        tuple[str, str]: its name, and the reason in a few words.

    Raises:
        ValueError: an unknown name.
        UnsupportedError: the named one is not possible; the message says why.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"attention: expected one of {NAMES}, got {name!r}")
    faults = {
        "flashmla": _why_not_installed_flashmla(capabilities),
        "flashinfer": _why_not_installed_flashinfer(capabilities),
        "eager": "",
    }
    if name is not None:
        if faults[name]:
            raise UnsupportedError(f"attention {name}: {faults[name]}")
        return name, "asked for"
    # In packed rows FlashMLA reads the pool itself; FlashInfer has them decoded first, but runs on every generation.
    best = next(name for name, fault in faults.items() if not fault)
    passed = [f"{name}: {fault}" for name, fault in faults.items() if fault]
    reason = f"the fastest for {capabilities.row_format} rows on {capabilities.device}"
    return best, "; ".join([reason, *passed])


def choose_attention(name: str | None, capabilities: Capabilities) -> tuple[type[Attention], str]:
    """`name_attention`, and the class instead of its name."""
    chosen, reason = name_attention(name, capabilities)
    return _load(chosen), reason


def make_attention(
    name: str | None,
    cache: CompressedKVCache | ExternalKVCache,
    num_heads: int,
    *,
    fixed: FixedShape | None = None,
    like: Attention | None = None,
) -> tuple[Attention, str]:
    """Choose as `choose_attention` does, and make it.

    Args:
        name (str | None): of `NAMES`; None takes the fastest that is possible.
        cache (CompressedKVCache): what is attended to.
        num_heads (int): query heads.
        fixed (FixedShape | None): the one shape of every step, for CUDA graphs; eager attention has no use for it.
        like (Attention | None): one of the same cache with a larger fixed shape, planned before. The two take turns, so the new
            one uses its buffers where the implementation can.

    Returns:
        tuple[Attention, str]: the attention, and the reason.
    """
    chosen, reason = choose_attention(name, find_capabilities(cache.device, cache.spec.row_format, num_heads))
    if chosen is EagerAttention:
        return EagerAttention(cache), reason
    workspace = getattr(like, "workspace", None)
    options = {} if workspace is None else {"workspace": workspace}
    return chosen(cache, num_heads, fixed=fixed, **options), reason  # type: ignore[call-arg]


def why_not_flashinfer(device: Device, row_format: str, num_heads: int) -> str:
    """Why FlashInfer cannot attend here; empty where it can."""
    if device.capability is None or device.capability < (8, 0):
        return f"expected a CUDA device of SM80 or later, got {device}"
    if row_format not in ("bf16", "fp8_584"):
        return f"expected bf16 or fp8_584 rows, got {row_format}"
    if not 1 <= num_heads <= 128:
        return f"expected 1 .. 128 query heads, got {num_heads}"
    return ""


def why_not_flashmla(device: Device, row_format: str, num_heads: int) -> str:
    """Why FlashMLA cannot attend here; empty where it can."""
    if device.capability != (9, 0):
        return f"expected a CUDA device of SM90, got {device}"
    if row_format != "fp8_584":
        return f"expected fp8_584 rows, got {row_format}"
    if num_heads not in (64, 128):
        return f"expected 64 or 128 query heads, got {num_heads}"
    return ""


def why_not_flashmla_prefill(device: Device, row_format: str, num_heads: int) -> str:
    """Why FlashInfer's attention cannot leave prefills to FlashMLA's kernel, over the pool as it is; empty where it can.

    Packed rows are FlashMLA's own attention's: it decodes them first (`sglang_dsv4.attention.decoded_prefill`).
    """
    if device.capability != (9, 0):
        return f"expected a CUDA device of SM90, got {device}"
    if row_format != "bf16":
        return f"expected bf16 rows, got {row_format}"
    if num_heads not in (64, 128):
        return f"expected 64 or 128 query heads, got {num_heads}"
    if installed(_FLASHMLA) is None:
        return f"expected the package {_FLASHMLA}, got none"
    return ""


def load_prefill(
    name: str, found: Device, row_format: str, num_heads: int
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """FlashMLA's prefill kernel for FlashInfer's attention, where ``name`` asks for it or leaves it open and it is possible;
    else None.

    Raises:
        UnsupportedError: an unknown name, or it was asked for and is not possible.
    """
    if name not in ("auto", "flashinfer", "flashmla"):
        raise UnsupportedError(f"prefill: expected auto, flashinfer or flashmla, got {name!r}")
    fault = why_not_flashmla_prefill(found, row_format, num_heads)
    if name == "flashmla" and fault:
        raise UnsupportedError(f"prefill flashmla: {fault}")
    if name == "flashinfer" or fault:
        return None
    from sglang_dsv4.attention.flashmla import sparse_prefill

    return sparse_prefill


def _why_not_installed_flashinfer(capabilities: Capabilities) -> str:
    found = capabilities.flashinfer
    wanted = ".".join(map(str, FIRST_FLASHINFER))
    if found is None:
        return f"expected the package flashinfer-python, {wanted} or later, got none"
    if tuple(int(part) for part in found.split(".")[:3]) < FIRST_FLASHINFER:
        return f"expected flashinfer-python {wanted} or later, got {found}"
    return why_not_flashinfer(capabilities.device, capabilities.row_format, capabilities.num_heads)


def _why_not_installed_flashmla(capabilities: Capabilities) -> str:
    if capabilities.flashmla is None:
        return f"expected the package {_FLASHMLA}, got none"
    return why_not_flashmla(capabilities.device, capabilities.row_format, capabilities.num_heads)


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _load(name: str) -> type[Attention]:
    if name == "flashinfer":
        from sglang_dsv4.attention.flashinfer import FlashInferAttention

        return FlashInferAttention
    if name == "flashmla":
        from sglang_dsv4.attention.flashmla import FlashMLAAttention

        return FlashMLAAttention
    return EagerAttention
