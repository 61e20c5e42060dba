"""FlashMLA, where it is installed: the kernels that SGLang attends with on Hopper."""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from dsv4_kernels.layout import FP8_584_ROW
from dsv4_kernels.row_lists.fused import row_lists
from dsv4_kernels.sink_rope.fused import sink_rope
from sglang_dsv4.attention.row_list_kinds import longest
from sglang_dsv4.bench.attention_work import AttentionWork

_FLASHMLA = "sglang_dsv4.attention.flashmla"
DECODE_MULTIPLE, PREFILL_MULTIPLE = 64, 128


def load() -> tuple[ModuleType | None, str]:
    """The module, or why there is none."""
    try:
        return importlib.import_module(_FLASHMLA).flash_mla, ""
    except ImportError as fault:
        return None, f"FlashMLA cannot be imported: {fault}"


def padded_lists(work: AttentionWork, layer_id: int, multiple: int) -> torch.Tensor:
    """The queries' lists, -1 behind them, as wide as FlashMLA demands."""
    width = -(-work.kind.width(longest(work.plan, None)) // multiple) * multiple
    lists = torch.full((work.case.num_tokens, width), -1, dtype=torch.int32, device=work.sink.device)
    row_lists(work.plan.step, work.kind, lists, work.selected[layer_id], pad=True)
    return lists


def decode(module: ModuleType, work: AttentionWork, layer_id: int, *, undo_rope: bool) -> Callable[[], torch.Tensor]:
    """A call of the decode kernel over packed rows; the sink is its own, the rotation is undone by our kernel."""
    fmt = FP8_584_ROW
    pool = work.cache.layers[layer_id].pool
    rows = pool.as_strided((len(pool), fmt.group_rows, 1, fmt.row_bytes), (fmt.group_bytes, fmt.row_bytes, fmt.row_bytes, 1))
    lists = padded_lists(work, layer_id, DECODE_MULTIPLE).unsqueeze(1)
    lengths = work.kind.lengths(work.plan.step.positions).int()
    q, meta = work.q[layer_id].unsqueeze(1), module.get_mla_metadata()[0]
    table = work.cache.layers[layer_id].rope_table
    positions, scale = work.plan.step.positions, 512**-0.5

    def call() -> torch.Tensor:
        out, lse = module.flash_mla_with_kvcache(
            q,
            rows,
            None,
            None,
            512,
            meta,
            None,
            scale,
            False,
            True,
            lists,
            work.sink,
            topk_length=lengths,
            use_legacy=True,
            kv_format="V4",
        )
        out = out.squeeze(1)
        if undo_rope:
            sink_rope(out, lse.view(out.shape[:2]), None, positions, table)
        return out

    return call


def prefill(module: ModuleType, work: AttentionWork, layer_id: int, *, undo_rope: bool) -> Callable[[], torch.Tensor]:
    """A call of the prefill kernel over bf16 rows."""
    pool = work.cache.layers[layer_id].pool
    lists = padded_lists(work, layer_id, PREFILL_MULTIPLE).unsqueeze(1)
    lengths = work.kind.lengths(work.plan.step.positions).int()
    table = work.cache.layers[layer_id].rope_table
    positions, scale = work.plan.step.positions, 512**-0.5

    def call() -> torch.Tensor:
        out, _, lse = module.flash_mla_sparse_fwd(
            work.q[layer_id], pool.view(-1, 1, 512), lists, scale, 512, work.sink, lengths, use_legacy=True
        )
        if undo_rope:
            sink_rope(out, lse, None, positions, table)
        return out

    return call
