"""What this machine can run, asked once at start-up. Portable ops are chosen by it, never by a version."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec

import torch

from sglang_dsv4.errors import UnsupportedError


@dataclass(frozen=True)
class Capabilities:
    """What the device and the installed packages offer.

    Attributes:
        device (str): ``cpu`` or ``cuda``.
        sm (int | None): compute capability as in SM90; None without a GPU.
        has_triton_gpu (bool): Triton kernels can be launched on the device.
        has_tilelang (bool): TileLang is installed.
        has_sgl_kernel (bool): SGLang's compiled kernels are installed, not a stand-in for them.
        has_deep_gemm (bool): DeepGEMM is installed.
    """

    device: str
    sm: int | None
    has_triton_gpu: bool
    has_tilelang: bool
    has_sgl_kernel: bool
    has_deep_gemm: bool

    @classmethod
    def detect(cls, device: str) -> "Capabilities":
        """Ask the machine.

        Args:
            device (str): what the server runs on: ``cpu``, ``cuda`` or ``cuda:<index>``.

        Raises:
            UnsupportedError: another device, or CUDA asked for and absent.
        """
        kind = torch.device(device).type
        if kind not in ("cpu", "cuda"):
            raise UnsupportedError(f"device {device}: expected cpu or cuda")
        on_gpu = kind == "cuda"
        if on_gpu and not torch.cuda.is_available():
            raise UnsupportedError(f"device {device}: expected a CUDA device, torch {torch.__version__} finds none")
        return cls(
            device=kind,
            sm=_compute_capability(device) if on_gpu else None,
            has_triton_gpu=on_gpu and find_spec("triton") is not None,
            has_tilelang=find_spec("tilelang") is not None,
            has_sgl_kernel=_has_distribution("sglang-kernel"),
            has_deep_gemm=find_spec("deep_gemm") is not None,
        )

    def on(self, device: str) -> "Capabilities":
        """The same packages on another machine.

        Args:
            device (str): ``cpu``, or a GPU by its architecture: ``sm_80``.

        Raises:
            UnsupportedError: neither of these.
        """
        if device == "cpu":
            return replace(self, device="cpu", sm=None, has_triton_gpu=False)
        number = device.removeprefix("sm_")
        if number == device or not number.isdecimal() or int(number) < _FIRST_SM:
            raise UnsupportedError(f"device {device!r}: expected cpu, or sm_{_FIRST_SM} or later, as in sm_90")
        has_triton = find_spec("triton") is not None
        return replace(self, device="cuda", sm=int(number), has_triton_gpu=has_triton)

    def offers(self, need: str) -> bool:
        """Whether a need of a stock kernel is met here.

        Args:
            need (str): a key of ``NEEDS``.

        Raises:
            ValueError: there is no such need.
        """
        if need not in NEEDS:
            raise ValueError(f"need: expected one of {sorted(NEEDS)}, got {need!r}")
        return NEEDS[need](self)


_FIRST_SM = 80


def _is_sm90(have: Capabilities) -> bool:
    return have.sm is not None and have.sm >= 90


# What a stock implementation may need, and how to tell that it is here. SM90 is the oldest architecture that SGLang
# serves DeepSeek-V4 on; older ones get the portable op even where a kernel might compile.
NEEDS: dict[str, Callable[[Capabilities], bool]] = {
    "cuda": lambda have: have.device == "cuda",
    "cuda_sm90": _is_sm90,
    "deep_gemm": lambda have: _is_sm90(have) and have.has_deep_gemm,
    "native_pool": lambda have: False,  # ours stands in its place
    "tilelang": lambda have: _is_sm90(have) and have.has_tilelang,
    "triton_gpu": lambda have: have.has_triton_gpu,
}


def _compute_capability(device: str) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _has_distribution(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
