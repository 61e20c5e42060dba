"""Attention by FlashMLA's Hopper kernels: over packed rows as they lie in the pool, or in long steps over rows decoded once.

A group of 64 rows is a page of FlashMLA's decode kernel, byte for byte; its prefill kernel reads bf16 rows, so a layer's pages
are decoded before it runs. The package is `sgl-flash-mla`, whose frozen kernels still know DeepSeek-V4's format; both have the
sink, so that only the rotation is left to do.
"""

import flash_mla
import torch

from dsv4_kernels.memory import empty
from dsv4_kernels.page_decode.fused import page_decode
from dsv4_kernels.row_lists import ListKind
from dsv4_kernels.row_lists.fused import row_lists
from dsv4_kernels.sink_rope.fused import sink_rope
from dsv4_kernels.step import StepTensors
from sglang_dsv4.attention.base import Attention
from sglang_dsv4.attention.decoded_prefill import DecodedStep, choose_decoded, decoded_step
from sglang_dsv4.attention.device import device_of
from sglang_dsv4.attention.host_lengths import HostLengths, host_lengths
from sglang_dsv4.attention.requirements import FLASHMLA
from sglang_dsv4.attention.row_list_kinds import FixedShape, is_in_place, longest
from sglang_dsv4.attention.sparse_prefill import LIST_MULTIPLE as PREFILL_LIST_MULTIPLE
from sglang_dsv4.attention.sparse_prefill import SparsePrefill
from sglang_dsv4.cache import CompressedKVCache, ExternalKVCache, LayerCache, StepPlan
from sglang_dsv4.errors import UnsupportedError

# Grow the buffer of decoded rows in steps of so many, so that successive chunks of a prompt rarely reallocate it.
_MORE_ROWS = 16384
_LIST_MULTIPLE = 64  # of columns in the decode kernel's lists


class FlashMLAAttention(Attention):
    """Has nothing to plan: every schedule is made by the first layer of its kind in a step.

    Without a fixed shape, the host's lengths say whether a step's rows are decoded once (`choose_decoded`). Buffers belong to
    this object and are used by one stream: all layers share that of decoded rows.

    Args:
        cache (CompressedKVCache): on a CUDA device of SM90, with fp8_584 rows.
        num_heads (int): query heads, 64 or 128.
        fixed (FixedShape | None): the one shape of every step, for CUDA graphs. ``begin`` is then part of what is captured.

    Raises:
        UnsupportedError: the device, row format or number of heads does not fit; the message says which.
    """

    name = "flashmla"

    def __init__(self, cache: CompressedKVCache | ExternalKVCache, num_heads: int, *, fixed: FixedShape | None = None) -> None:
        super().__init__(cache, bf16_heads=num_heads)
        self.num_heads = num_heads
        fault = FLASHMLA.why_not(device_of(cache.device), cache.spec.row_format, num_heads)
        if fault:
            raise UnsupportedError(f"attention flashmla: {fault}")
        self.fixed = fixed
        self._sparse_prefill = SparsePrefill(self.sm_scale)
        self._lists: dict[str, torch.Tensor] = {}
        self._lengths: dict[str, torch.Tensor] = {}
        self._meta: dict[str, object] = {}
        self._decoded: DecodedStep | None = None
        self._rows = empty((0, cache.spec.head_dim), torch.bfloat16, cache.device)

    @property
    def needs_host_lengths(self) -> bool:
        return self.fixed is None

    @property
    def numbering(self) -> StepTensors | None:
        return None if self._decoded is None else self._decoded.step

    def buffers(self) -> dict[int, int]:
        held = (*self._lists.values(), *self._lengths.values(), self._rows)
        return {tensor.data_ptr(): tensor.nbytes for tensor in held if tensor.nbytes}

    def begin(self, plan: StepPlan, lengths: HostLengths | None = None) -> None:
        if self.fixed is not None and plan.num_tokens != self.fixed.num_tokens:
            raise ValueError(f"begin: expected {self.fixed.num_tokens} tokens, the fixed shape, got {plan.num_tokens}")
        decoded = self._plan_decoded(plan, lengths)
        self._plan, self._decoded = plan, decoded
        for kind in self.distinct_kinds:
            lists, listed = self._buffers(kind, plan)
            step = plan.step if decoded is None else decoded.step
            row_lists(step, kind, lists, pad=True, lengths=listed)
            if decoded is None:
                self._meta[kind.name] = flash_mla.get_mla_metadata()[0]

    def _attend(
        self, layer: LayerCache, q: torch.Tensor, sink: torch.Tensor, selected: torch.Tensor | None, undo_rope: bool
    ) -> torch.Tensor:
        if len(q) == 0:
            return empty(tuple(q.shape), q.dtype, q.device)
        kind = self.kinds[layer.layer_id]
        lists, step = self._lists[kind.name][: len(q)], self._plan.step
        if selected is not None and not is_in_place(selected, lists):
            row_lists(step, kind, lists, selected, window=False)
        lengths = self._lengths[kind.name][: len(q)]
        if self._decoded is None:
            out, lse = self._attend_packed(layer, q, sink, lists, lengths, kind)
        else:
            rows = self._decode(layer, self._decoded)
            out, lse = self._sparse_prefill(q.contiguous(), rows, lists, lengths, sink)
        if undo_rope:
            sink_rope(out, lse, None, step.positions, layer.rope_table)
        return out

    def _attend_packed(
        self, layer: LayerCache, q: torch.Tensor, sink: torch.Tensor, lists: torch.Tensor, lengths: torch.Tensor, kind: ListKind
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """FlashMLA's decode kernel over the pool; results as of `SparsePrefill`."""
        fmt, pool = layer.row_format, layer.pool
        pages = pool.as_strided(
            (len(pool), fmt.group_rows, 1, fmt.row_bytes), (fmt.group_bytes, fmt.row_bytes, fmt.row_bytes, 1)
        )
        out, lse = flash_mla.flash_mla_with_kvcache(
            q.unsqueeze(1),
            pages,
            None,
            None,
            self.spec.head_dim,
            self._meta[kind.name],
            None,
            self.sm_scale,
            False,
            True,
            lists.unsqueeze(1),
            sink.float(),
            topk_length=lengths,
            use_legacy=True,
            kv_format="V4",
        )
        return out.squeeze(1), lse.view(q.shape[:2])

    def _decode(self, layer: LayerCache, decoded: DecodedStep) -> torch.Tensor:
        """A layer's rows of this step, bf16."""
        rows = self._rows[: decoded.num_rows(layer.ratio)]
        page_decode(
            layer.pool,
            layer.row_format,
            decoded.window_pages,
            decoded.history_pages,
            decoded.step.page_tokens,
            layer.ratio,
            self._plan.step.num_window_rows,
            rows,
        )
        return rows

    def selected_buffer(self, layer: LayerCache) -> torch.Tensor | None:
        kind = self.kinds[layer.layer_id]
        if kind.most is None:
            return None
        most = kind.width(longest(self._plan, self.fixed)) - kind.window
        return self._lists[kind.name][: self._plan.num_tokens, :most]

    def _plan_decoded(self, plan: StepPlan, lengths: HostLengths | None) -> DecodedStep | None:
        """The step over decoded rows, with room for them; None where packed rows are read."""
        if self.fixed is not None or plan.num_tokens == 0:
            return None
        spec = self.spec
        counts = choose_decoded(host_lengths(plan, lengths), spec)
        if counts is None:
            return None
        decoded = decoded_step(plan.step, counts, spec.window)
        most = max(decoded.num_rows(layer.ratio) for layer in spec.layers)
        if len(self._rows) < most:
            most = -(-most // _MORE_ROWS) * _MORE_ROWS
            self._rows = self._rows.new_zeros((0, spec.head_dim))  # give the old one back first
            self._rows = empty((most, spec.head_dim), torch.bfloat16, self.device)
        return decoded

    def _buffers(self, kind: ListKind, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the step's lists of a kind are written, and their lengths; a fixed shape's stay where they are."""
        width = kind.width(longest(plan, self.fixed))
        # Without a fixed shape either kernel may be next: lists that fit both are not made anew at every turn.
        multiple = PREFILL_LIST_MULTIPLE if self.fixed is None else _LIST_MULTIPLE
        width = -(-width // multiple) * multiple
        found = self._lists.get(kind.name)
        if found is None or found.shape[1] != width or len(found) < plan.num_tokens:
            found = empty((plan.num_tokens, width), torch.int32, self.device)
            self._lists[kind.name] = found
            self._lengths[kind.name] = empty((len(found),), torch.int32, found.device)
        return found[: plan.num_tokens], self._lengths[kind.name][: plan.num_tokens]
