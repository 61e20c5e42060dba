"""Scores and top-k of the indexer by other libraries, where they are installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_kernels.layout import FP8_INDEX
from sglang_dsv4.bench.cases import PAGE_TOKENS
from sglang_dsv4.bench.job import load
from sglang_dsv4.bench.timing import Call
from sglang_dsv4.cache.long_scores import PACKAGE, gather_keys
from sglang_dsv4.spec import CSA_RATIO

if TYPE_CHECKING:
    from sglang_dsv4.bench.index import IndexWork

MODULES = ("sglang.kernels.ops.attention.dsv4.topk", PACKAGE, "flashinfer.topk")
_PER_PAGE = PAGE_TOKENS // CSA_RATIO


def choices(work: IndexWork, scores: torch.Tensor) -> dict[str, Call]:
    """Calls that choose the best of ``scores``, by name; each is one that a CUDA graph can capture."""
    found: dict[str, Call] = {}
    step, last = work.step, work.last
    lengths, k = work.visible[last].to(torch.int32), work.out.shape[1]
    sglang, _ = load(MODULES[0])
    if sglang is not None:
        pages = step.history_pages[step.token_rows[last]].to(torch.int32)
        out = torch.empty_like(work.out[last])
        plan = sglang.plan_topk_v2(lengths)
        found["sglang"] = lambda: sglang.topk_transform_512(scores, lengths, pages, out, _PER_PAGE)
        found["sglang_v2"] = lambda: sglang.topk_transform_512_v2(scores, lengths, pages, out, _PER_PAGE, plan)
    flashinfer, _ = load(MODULES[2])
    if flashinfer is not None:
        rows = step.token_rows[last].to(torch.int32)
        entries = torch.arange(scores.shape[1], device=scores.device)
        requests = torch.arange(len(step.seq_lens), device=scores.device).unsqueeze(1)
        table = step.entry_slots(requests, entries, CSA_RATIO).to(torch.int32)
        found["flashinfer"] = lambda: flashinfer.top_k_page_table_transform(scores, table, lengths, k, rows)
        # Our rule for ties, in versions that have one; its result is in no order.
        if hasattr(flashinfer, "TopKTieBreak"):
            rule = {"deterministic": True, "tie_break": int(flashinfer.TopKTieBreak.SMALL)}
            found["flashinfer_exact"] = lambda: flashinfer.top_k_page_table_transform(scores, table, lengths, k, rows, **rule)
    return found


def scores(work: IndexWork) -> Call | None:
    """DeepGEMM's scores of the last piece, as SGLang asks for them.

    One token per request reads pages of 64 keys. Many tokens of one request read its keys from where they lie in a row; the
    gathering, once a step and layer, is not timed.
    """
    module, _ = load(PACKAGE)
    if module is None or work.key_format is not FP8_INDEX:
        return None
    step, heads = work.step, work.q.shape[1]
    queries, weights = (held[: work.count, :heads].contiguous() for held in (work.workspace.query, work.workspace.weights))
    lengths, longest = work.visible[work.last].to(torch.int32), work.scores().shape[1]
    if len(step.seq_lens) == 1 < work.count:
        row, begins = gather_keys(work.pool, step.history_pages[0]), torch.zeros_like(lengths)
        return lambda: module.fp8_mqa_logits(queries, row, weights, begins, lengths, clean_logits=False, max_seqlen_k=longest)
    if len(step.positions) != len(step.seq_lens):
        return None
    keys = work.pool.view(-1, _PER_PAGE, 1, FP8_INDEX.row_bytes)
    pages = step.history_pages.to(torch.int32)
    queries, lengths = queries.unsqueeze(1), lengths.unsqueeze(1)
    sms = torch.cuda.get_device_properties(work.q.device).multi_processor_count
    schedule = module.get_paged_mqa_logits_metadata(lengths, _PER_PAGE, sms)
    return lambda: module.fp8_paged_mqa_logits(queries, keys, weights, lengths, pages, schedule, longest, False)
