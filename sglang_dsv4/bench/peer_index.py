"""Scores and top-k of the indexer by other libraries, where they are installed."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from dsv4_kernels.layout import FP8_INDEX
from sglang_dsv4.bench.cases import PAGE_TOKENS
from sglang_dsv4.bench.index_work import IndexWork
from sglang_dsv4.cache.long_scores import PACKAGE, gather_keys
from sglang_dsv4.spec import CSA_RATIO

_SGLANG = "sglang.kernels.ops.attention.dsv4.topk"
_FLASHINFER = "flashinfer.topk"
_PER_PAGE = PAGE_TOKENS // CSA_RATIO


def load(name: str) -> tuple[Any, str]:
    """A module, or None and why not."""
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{name}: {error}"


def missing() -> list[str]:
    """Why peers cannot be timed, one line each."""
    reasons = (load(name)[1] for name in (_SGLANG, PACKAGE, _FLASHINFER))
    return [reason for reason in reasons if reason]


def _lengths(work: IndexWork) -> torch.Tensor:
    return work.visible.to(torch.int32)


def topk_peers(work: IndexWork, scores: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Calls that choose the best of ``scores``, by name; each is one that a CUDA graph can capture."""
    found: dict[str, Callable[[], object]] = {}
    first, _ = work.piece
    lengths, k = _lengths(work)[first:], work.out.shape[1]
    sglang, _ = load(_SGLANG)
    if sglang is not None:
        pages = work.step.history_pages[work.step.token_rows[first:]].to(torch.int32)
        out = torch.empty_like(work.out[first:])
        found["sglang"] = lambda: sglang.topk_transform_512(scores, lengths, pages, out, _PER_PAGE)
        plan = sglang.plan_topk_v2(lengths)
        found["sglang_v2"] = lambda: sglang.topk_transform_512_v2(scores, lengths, pages, out, _PER_PAGE, plan)
    flashinfer, _ = load(_FLASHINFER)
    if flashinfer is not None:
        rows = work.step.token_rows[first:].to(torch.int32)
        entries = torch.arange(scores.shape[1], device=scores.device)
        requests = torch.arange(len(work.step.seq_lens), device=scores.device).unsqueeze(1)
        table = work.step.entry_slots(requests, entries, CSA_RATIO).to(torch.int32)
        found["flashinfer"] = lambda: flashinfer.top_k_page_table_transform(scores, table, lengths, k, rows)
        # Our rule for ties, in versions that have one; its result is in no order.
        if hasattr(flashinfer, "TopKTieBreak"):
            rule = {"deterministic": True, "tie_break": int(flashinfer.TopKTieBreak.SMALL)}
            found["flashinfer_exact"] = lambda: flashinfer.top_k_page_table_transform(scores, table, lengths, k, rows, **rule)
    return found


def scores_peer(work: IndexWork) -> Callable[[], object] | None:
    """DeepGEMM's scores of the last piece, as SGLang asks for them.

    One token per request reads pages of 64 keys. Many tokens of one request read its keys from where they lie in a row; to
    gather them there, once a step and layer, is not timed.
    """
    module, _ = load(PACKAGE)
    if module is None or work.key_format is not FP8_INDEX:
        return None
    first, count = work.piece
    heads = work.q.shape[1]
    queries = work.workspace.query[:count, :heads].contiguous()
    weights = work.workspace.weights[:count, :heads].contiguous()
    lengths = _lengths(work)[first:]
    longest = work.scores().shape[1]
    if len(work.step.seq_lens) == 1 < count:
        row = gather_keys(work.pool, work.step.history_pages[0])
        begins = torch.zeros_like(lengths)
        return lambda: module.fp8_mqa_logits(queries, row, weights, begins, lengths, clean_logits=False, max_seqlen_k=longest)
    if len(work.step.positions) != len(work.step.seq_lens):
        return None
    keys = work.pool.view(-1, _PER_PAGE, 1, FP8_INDEX.row_bytes)
    pages = work.step.history_pages.to(torch.int32)
    sms = torch.cuda.get_device_properties(work.q.device).multi_processor_count
    schedule = module.get_paged_mqa_logits_metadata(lengths.unsqueeze(1), _PER_PAGE, sms)
    return lambda: module.fp8_paged_mqa_logits(
        queries.unsqueeze(1), keys, weights, lengths.unsqueeze(1), pages, schedule, longest, False
    )
