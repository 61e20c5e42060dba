"""FlashMLA's prefill kernel: every query reads bf16 rows by a list of its own."""

import torch

from sglang_dsv4.attention.device import Device
from sglang_dsv4.attention.requirements import SPARSE_PREFILL, installed
from sglang_dsv4.errors import UnsupportedError

LIST_MULTIPLE = 128  # of columns in the kernel's lists


class SparsePrefill:
    """The kernel. SM90; 64 or 128 heads.

    Args:
        sm_scale (float): softmax scale.

    Raises:
        ImportError: sgl-flash-mla is not installed.
    """

    def __init__(self, sm_scale: float) -> None:
        import flash_mla

        self._kernel = flash_mla.flash_mla_sparse_fwd
        self._sm_scale = sm_scale

    def __call__(
        self, q: torch.Tensor, rows: torch.Tensor, lists: torch.Tensor, lengths: torch.Tensor, sink: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend.

        Args:
            q (torch.Tensor): ``[T, H, 512]`` bf16, contiguous.
            rows (torch.Tensor): ``[R, 512]`` bf16.
            lists (torch.Tensor): ``[T, W]`` int32 rows, ``W`` a multiple of `LIST_MULTIPLE`, -1 behind each list.
            lengths (torch.Tensor): ``[T]`` int32.
            sink (torch.Tensor): ``[H]``, sink logits.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: ``[T, H, 512]`` bf16 with the sink, and ``[T, H]`` fp32, the natural log-sum-exp
            without it.
        """
        keys, lists, head_dim = rows.unsqueeze(1), lists.unsqueeze(1), q.shape[-1]
        out, _, lse = self._kernel(q, keys, lists, self._sm_scale, head_dim, sink.float(), lengths, use_legacy=True)
        return out, lse


def choose_sparse_prefill(name: str, device: Device, row_format: str, num_heads: int, sm_scale: float) -> SparsePrefill | None:
    """The kernel that FlashInfer's attention runs its prefills with, over the pool as it is.

    Args:
        name (str): ``"flashmla"``, ``"flashinfer"`` (no other kernel), or ``"auto"``: FlashMLA's where it is possible.
        device (Device): where the cache lives.
        row_format (str): of its rows.
        num_heads (int): query heads.
        sm_scale (float): softmax scale.

    Raises:
        UnsupportedError: an unknown name, or FlashMLA's was asked for and is not possible.
    """
    if name not in ("auto", "flashinfer", "flashmla"):
        raise UnsupportedError(f"prefill: expected auto, flashinfer or flashmla, got {name!r}")
    if name == "flashinfer":
        return None
    needs = SPARSE_PREFILL
    fault = needs.why_not(device, row_format, num_heads) or needs.why_not_installed(installed(needs.package))
    if not fault:
        return SparsePrefill(sm_scale)
    if name == "flashmla":
        raise UnsupportedError(f"prefill flashmla: {fault}")
    return None
