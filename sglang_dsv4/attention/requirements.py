"""What each attention needs of the device, of an installed package, and of the cache's rows."""

from dataclasses import dataclass, replace
from importlib import metadata

import torch
from packaging.version import InvalidVersion, Version

from sglang_dsv4.attention.device import Device, device_of


@dataclass(frozen=True)
class Requirements:
    """What one implementation needs.

    Attributes:
        package (str): the distribution whose kernels it launches.
        capability (tuple[int, int]): CUDA compute capability of the device.
        row_formats (tuple[str, ...]): formats of rows that its kernels read.
        num_heads (tuple[int, ...] | range): query heads.
        first_version (str | None): the oldest version of the package that works; None where any does.
        and_later (bool): whether devices of later capabilities work as well.
    """

    package: str
    capability: tuple[int, int]
    row_formats: tuple[str, ...]
    num_heads: tuple[int, ...] | range
    first_version: str | None = None
    and_later: bool = False

    def why_not(self, device: Device, row_format: str, num_heads: int) -> str:
        """Why it cannot attend on a device to rows of a format; empty where it can."""
        found = device.capability
        if found is None or found < self.capability or (found != self.capability and not self.and_later):
            later = " or later" if self.and_later else ""
            return f"expected a CUDA device of SM{self.capability[0]}{self.capability[1]}{later}, got {device}"
        if row_format not in self.row_formats:
            return f"expected {' or '.join(self.row_formats)} rows, got {row_format}"
        if num_heads not in self.num_heads:
            few = isinstance(self.num_heads, tuple)
            wanted = " or ".join(map(str, self.num_heads)) if few else f"{self.num_heads[0]} .. {self.num_heads[-1]}"
            return f"expected {wanted} query heads, got {num_heads}"
        return ""

    def why_not_installed(self, version: str | None) -> str:
        """Why a version of the package is not enough; empty where it is.

        Args:
            version (str | None): the installed version, of `installed`.
        """
        since = "" if self.first_version is None else f"{self.first_version} or later"
        if version is None:
            return f"expected the package {self.package}{since and f', {since}'}, got none"
        if self.first_version is not None and _is_before(version, self.first_version):
            return f"expected {self.package} {since}, got {version}"
        return ""


# Earlier kernels of FlashInfer begin their sums with what was in the registers where head_dim_kpe is 0.
FLASHINFER = Requirements(
    "flashinfer-python", (8, 0), ("bf16", "fp8_584"), range(1, 129), first_version="0.6.18", and_later=True
)
FLASHMLA = Requirements("sgl-flash-mla", (9, 0), ("fp8_584",), (64, 128))
# FlashMLA's prefill kernel over bf16 rows, as FlashInfer's attention uses it. Packed rows have to be decoded for it first,
# which FlashMLA's own attention does (`sglang_dsv4.attention.decoded_prefill`).
SPARSE_PREFILL = replace(FLASHMLA, row_formats=("bf16",))


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

    def why_not(self, name: str) -> str:
        """Why an attention is not possible; empty where it is.

        Args:
            name (str): ``"eager"``, ``"flashinfer"`` or ``"flashmla"``.
        """
        if name == "eager":
            return ""
        needs, version = {"flashinfer": (FLASHINFER, self.flashinfer), "flashmla": (FLASHMLA, self.flashmla)}[name]
        return needs.why_not_installed(version) or needs.why_not(self.device, self.row_format, self.num_heads)


def find_capabilities(device: torch.device, row_format: str, num_heads: int) -> Capabilities:
    """Look at the device and at the installed packages; arguments as the fields of `Capabilities`."""
    return Capabilities(device_of(device), row_format, num_heads, installed(FLASHINFER.package), installed(FLASHMLA.package))


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_before(version: str, first: str) -> bool:
    """Whether a version is older than another; one that cannot be read counts as older."""
    try:
        return Version(version) < Version(first)
    except InvalidVersion:
        return True
