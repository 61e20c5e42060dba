"""Scores of long prefills by DeepGEMM, where it is installed: the kernel that SGLang has for them.

It takes the same queries and keys as ours, e4m3 and their scales, and two thirds of the time; its sums of heads have another
order, so that a score may differ in its last bits. It reads keys that lie in one row, so those of the request are gathered
first, once a layer.
"""

import importlib
from importlib.util import find_spec
from typing import Any

import torch

from dsv4_kernels.group_maxima.fused import group_maxima
from dsv4_kernels.index_query.fused import index_query
from dsv4_kernels.index_score.workspace import IndexWorkspace
from dsv4_kernels.index_select.fused import check_arguments
from dsv4_kernels.index_topk import GROUP
from dsv4_kernels.index_topk.fused import topk_entries
from dsv4_kernels.layout import FP8_INDEX, RowFormat
from dsv4_kernels.memory import empty
from dsv4_kernels.step import StepTensors

PACKAGE = "deep_gemm"
# Where it was measured to win, with room to spare: a gather and three launches more a layer cost what 200 tokens gain.
FEWEST_TOKENS = 2048
# Scores at once. A long prefill in many pieces waits for the last programs of each.
MOST_SCORES = 1 << 26
_HEADS = 64
_CAPABILITY = (9, 0)


def has_deep_gemm(device: torch.device, key_format: RowFormat) -> bool:
    """Whether DeepGEMM is installed and can score such keys on this device."""
    if device.type != "cuda" or key_format is not FP8_INDEX:
        return False
    capability = torch.cuda.get_device_capability(device)
    return capability == _CAPABILITY and find_spec(PACKAGE) is not None


def load_deep_gemm() -> Any:
    """Its module. Not loaded before it is needed: it looks for a GPU and its compiler."""
    return importlib.import_module("deep_gemm")


def is_worthwhile(step: StepTensors, heads: int, ratio: int, k: int) -> bool:
    """Whether a step is one that DeepGEMM's kernel is faster for, as shapes say: a long prefill of one request."""
    per_page = step.page_tokens // ratio
    entries = step.history_pages.shape[1] * per_page
    is_long = len(step.seq_lens) == 1 and len(step.positions) >= FEWEST_TOKENS and entries > k
    return is_long and heads == _HEADS and per_page == FP8_INDEX.group_rows


def gather_keys(pool: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of some pages in a row.

    Args:
        pool (torch.Tensor): index keys in the format fp8, a group a page.
        pages (torch.Tensor): ``[P]`` int64.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: ``[P * 64, 128]`` e4m3, and their scales ``[P * 64]`` fp32.
    """
    # Cells of a page table behind a request's last page may name none.
    pages = pages.clamp(0, len(pool) - 1)
    data = FP8_INDEX.scale_offset
    scales = slice(data, data + FP8_INDEX.group_rows * FP8_INDEX.scale_bytes)
    keys = pool[:, :data][pages].view(torch.float8_e4m3fn).view(-1, FP8_INDEX.dim)
    return keys, pool[:, scales][pages].view(torch.float32).flatten()


def select_long(
    step: StepTensors,
    index_q: torch.Tensor,
    index_weights: torch.Tensor,
    index_pool: torch.Tensor,
    cos_sin: torch.Tensor,
    ratio: int,
    out: torch.Tensor,
    workspace: IndexWorkspace,
    pad: bool,
    numbering: StepTensors | None,
) -> None:
    """The DeepGEMM variant of `dsv4_kernels.index_select.fused.select_entries`, for steps that `is_worthwhile` accepts.

    Not for graphs: the layer's keys are gathered, and DeepGEMM makes its scores, in new memory, which goes back when the layer
    is done: 132 bytes a key, and 4.5 a score of at most `MOST_SCORES`.
    """
    check_arguments(step, index_q, index_weights, index_pool, cos_sin, workspace)
    score, (num_tokens, k) = load_deep_gemm().fp8_mqa_logits, out.shape
    keys = gather_keys(index_pool, step.history_pages[0])
    ends = ((step.positions + 1) // ratio).to(torch.int32)
    begins = torch.zeros_like(ends)
    entries = len(keys[0])
    size = min(len(workspace.query), max(1, MOST_SCORES // entries))
    maxima = empty((size, entries // GROUP), torch.float32, index_q.device)
    for first in range(0, num_tokens, size):
        count = min(size, num_tokens - first)
        # `first_tiles` numbers tiles of our own kernel's scores; it is unused on this path.
        index_query(
            step,
            index_q,
            index_weights,
            cos_sin,
            ratio,
            k,
            workspace.query.view(torch.uint8),
            workspace.weights,
            workspace.first_tiles,
            1,
            FP8_INDEX.group_rows,
            first,
            count,
        )
        part = slice(first, first + count)
        scores = score(
            workspace.query[:count],
            keys,
            workspace.weights[:count],
            begins[part],
            ends[part],
            clean_logits=False,
            max_seqlen_k=entries,
        )
        scores, best = scores[:, :entries], maxima[:count]
        group_maxima(step.positions, first, ratio, scores, best, GROUP * k)
        listing = step if numbering is None else numbering
        topk_entries(listing, scores, best, first, ratio, out, workspace.groups, pad)
