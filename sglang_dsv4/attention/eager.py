"""Attention in plain PyTorch, on any device."""

import torch

from dsv4_kernels.memory import empty
from dsv4_kernels.sink_rope import naive_sink_rope
from dsv4_kernels.sparse_attention import naive_sparse_attention
from sglang_dsv4.attention.base import Attention
from sglang_dsv4.attention.host_lengths import HostLengths
from sglang_dsv4.cache import LayerCache, StepPlan

# fp32 values of gathered rows held at once: 16 MiB, which stays near the cores' caches.
_MAX_GATHERED_VALUES = 1 << 22


class EagerAttention(Attention):
    """Gathers each token's rows and computes in fp32; the oracle of the faster implementations."""

    name = "eager"

    @property
    def capture_fault(self) -> str:
        return "it asks the device how many entries there are"

    def begin(self, plan: StepPlan, lengths: HostLengths | None = None) -> None:
        self._plan = plan

    def _attend(
        self, layer: LayerCache, q: torch.Tensor, sink: torch.Tensor, selected: torch.Tensor | None, undo_rope: bool
    ) -> torch.Tensor:
        rows = self._plan.rows
        entries = rows.every_entry(layer.ratio) if layer.ratio and selected is None else selected
        indices = rows.window if entries is None else torch.cat([rows.window, entries], dim=1)  # [T, window + K]
        out = empty(tuple(q.shape), q.dtype, q.device)
        lse = empty(tuple(q.shape[:2]), torch.float32, q.device)
        chunk = max(1, _MAX_GATHERED_VALUES // (indices.shape[1] * q.shape[-1]))
        for begin in range(0, len(q), chunk):
            part = slice(begin, begin + chunk)
            out[part], lse[part] = naive_sparse_attention(
                q[part], layer.pool, layer.row_format, indices[part], sink, self.sm_scale
            )
        if undo_rope:
            naive_sink_rope(out, lse, None, self._plan.step.positions, layer.rope_table)
        return out
