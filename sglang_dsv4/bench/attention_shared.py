"""Prefill of an HCA layer in two passes: each query's window by its own list, and the entries, which neighbouring queries
share, by one list per request. The passes are merged by their log-sum-exp."""

import math
from collections.abc import Callable
from typing import Any

import torch

from dsv4_kernels.memory import empty
from dsv4_kernels.row_lists import ListKind
from dsv4_kernels.row_lists.fused import row_lists
from dsv4_kernels.sink_rope.fused import sink_rope
from sglang_dsv4.check.attention_work import AttentionWork

_MERGED_HEADS = 32  # FlashInfer's merge launches 32 threads per head of 512 values, at most 1,024
_WORKSPACE_BYTES = 64 << 20


def prepare(module: Any, work: AttentionWork, backend: str) -> list[Callable[[], torch.Tensor]]:
    """A call per layer, of one request's prefill.

    Args:
        module (Any): `sglang_dsv4.attention.flashinfer`.
        work (AttentionWork): the step.
        backend (str): FlashInfer's.
    """
    device, count, heads = work.sink.device, work.case.num_tokens, work.case.heads
    positions = work.lengths.positions()
    window = ListKind("window", work.kind.window)
    lists = empty((count, window.window), torch.int32, device)
    row_lists(work.plan.step, window, lists)
    visible = work.kind.num_entries(positions)
    values, runs = torch.unique_consecutive(visible, return_counts=True)
    last = work.indices(0)[-1, work.kind.window :].int().contiguous()  # every entry of the request, in order

    def planned(queries: torch.Tensor, begins: torch.Tensor, indices: torch.Tensor, lengths: torch.Tensor) -> Any:
        wrapper = module.BatchMLAPagedAttentionWrapper(empty((_WORKSPACE_BYTES,), torch.uint8, device), backend=backend)
        ints = [tensor.int() for tensor in (queries, begins)]
        wrapper.plan(*ints, indices, lengths.int(), heads, 512, 0, 1, False, 512**-0.5, torch.bfloat16, torch.bfloat16)
        return wrapper

    arange = torch.arange(count + 1)
    own = planned(arange, arange * window.window, lists.view(-1), window.lengths(positions))
    starts = torch.cat([runs.new_zeros(1), runs.cumsum(0)])
    shared = planned(starts, 0 * starts, last, values)
    table, step = work.cache.layers[0].rope_table, work.plan.step

    def call(layer_id: int) -> torch.Tensor:
        q, rows = work.q[layer_id], work.cache.layers[layer_id].pool.view(-1, 1, 512)
        parts = [wrapper.run(q, q[..., :0], rows, rows[..., :0], return_lse=True) for wrapper in (own, shared)]
        tiles = [tensor.view(-1, _MERGED_HEADS, *tensor.shape[2:]) for part in parts for tensor in part]
        out, lse = module.flashinfer.merge_state(*tiles)
        out = out.view(q.shape)
        sink_rope(out, lse.view(q.shape[:2]) * math.log(2), work.sink, step.positions, table)
        return out

    return [lambda i=i: call(i) for i in range(len(work.q))]  # type: ignore[misc]
