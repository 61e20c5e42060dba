"""FlashMLA, where it is installed: the kernels that SGLang attends with on Hopper."""

from collections.abc import Callable
from typing import Any

import torch

from dsv4_kernels.layout import FP8_584_ROW
from dsv4_kernels.row_lists.fused import row_lists
from dsv4_kernels.sink_rope.fused import sink_rope
from sglang_dsv4.attention.row_list_kinds import longest
from sglang_dsv4.check.attention_work import SCALE, AttentionWork

MODULE = "sglang_dsv4.attention.flashmla"
DECODE_MULTIPLE, PREFILL_MULTIPLE = 64, 128


def padded_lists(work: AttentionWork, layer_id: int, multiple: int) -> torch.Tensor:
    """The queries' lists, -1 behind them, as wide as FlashMLA demands: ``[T, 1, N]``."""
    width = -(-work.kind.width(longest(work.plan, None)) // multiple) * multiple
    lists = torch.full((work.case.num_tokens, width), -1, dtype=torch.int32, device=work.sink.device)
    row_lists(work.plan.step, work.kind, lists, work.selected[layer_id], pad=True)
    return lists.unsqueeze(1)


def _finished(
    work: AttentionWork, layer_id: int, attend: Callable[[], tuple[torch.Tensor, torch.Tensor]], undo_rope: bool
) -> Callable[[], torch.Tensor]:
    table, positions = work.cache.layers[layer_id].rope_table, work.plan.step.positions

    def call() -> torch.Tensor:
        out, lse = attend()
        if undo_rope:
            sink_rope(out, lse.view(out.shape[:2]), None, positions, table)
        return out

    return call


def decode(module: Any, work: AttentionWork, layer_id: int, *, undo_rope: bool) -> Callable[[], torch.Tensor]:
    """A call of the decode kernel over packed rows; it takes the sink into account, our kernel undoes the rotation."""
    fmt, pool = FP8_584_ROW, work.cache.layers[layer_id].pool
    rows = pool.as_strided((len(pool), fmt.group_rows, 1, fmt.row_bytes), (fmt.group_bytes, fmt.row_bytes, fmt.row_bytes, 1))
    lists, lengths = padded_lists(work, layer_id, DECODE_MULTIPLE), work.kind.lengths(work.plan.step.positions).int()
    meta = module.get_mla_metadata()[0]
    operands = (work.q[layer_id].unsqueeze(1), rows, None, None, 512, meta, None, SCALE, False, True, lists, work.sink)
    options = {"topk_length": lengths, "use_legacy": True, "kv_format": "V4"}

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = module.flash_mla_with_kvcache(*operands, **options)
        return out.squeeze(1), lse

    return _finished(work, layer_id, attend, undo_rope)


def prefill(module: Any, work: AttentionWork, layer_id: int, *, undo_rope: bool) -> Callable[[], torch.Tensor]:
    """A call of the prefill kernel over bf16 rows."""
    rows = work.cache.layers[layer_id].pool.view(-1, 1, 512)
    lists, lengths = padded_lists(work, layer_id, PREFILL_MULTIPLE), work.kind.lengths(work.plan.step.positions).int()

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        operands = (work.q[layer_id], rows, lists, SCALE, 512, work.sink, lengths)
        out, _, lse = module.flash_mla_sparse_fwd(*operands, use_legacy=True)
        return out, lse

    return _finished(work, layer_id, attend, undo_rope)
