"""Scores and top-k of the indexer by other libraries, where they are installed."""

import importlib
from collections.abc import Callable

import torch

from dsv4_kernels.layout import FP8_INDEX
from sglang_dsv4.bench.cases import PAGE_TOKENS
from sglang_dsv4.bench.index_work import IndexWork
from sglang_dsv4.spec import CSA_RATIO

_SGLANG = "sglang.kernels.ops.attention.dsv4.topk"
_DEEP_GEMM = "deep_gemm"
_FLASHINFER = "flashinfer.topk"
_PER_PAGE = PAGE_TOKENS // CSA_RATIO


def load(name: str) -> tuple[object | None, str]:
    """A module, or None and why not."""
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{name}: {error}"


def missing() -> list[str]:
    """Why peers cannot be timed, one line each."""
    reasons = (load(name)[1] for name in (_SGLANG, _DEEP_GEMM, _FLASHINFER))
    return [reason for reason in reasons if reason]


def _lengths(work: IndexWork) -> torch.Tensor:
    return work.visible.to(torch.int32)


def topk_peers(work: IndexWork, scores: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Calls that choose the best of ``scores``, by name; each is one that a CUDA graph can capture."""
    found: dict[str, Callable[[], object]] = {}
    lengths, k = _lengths(work), work.out.shape[1]
    sglang, _ = load(_SGLANG)
    if sglang is not None:
        pages = work.step.history_pages[work.step.token_rows].to(torch.int32)
        out = torch.empty_like(work.out)
        found["sglang"] = lambda: sglang.topk_transform_512(scores, lengths, pages, out, _PER_PAGE)
    flashinfer, _ = load(_FLASHINFER)
    if flashinfer is not None:
        rows = work.step.token_rows.to(torch.int32)
        entries = torch.arange(scores.shape[1], device=scores.device)
        requests = torch.arange(len(work.step.seq_lens), device=scores.device).unsqueeze(1)
        table = work.step.entry_slots(requests, entries, CSA_RATIO).to(torch.int32)
        found["flashinfer"] = lambda: flashinfer.top_k_page_table_transform(
            scores, table, lengths, k, rows
        )
        # Our rule for ties, in versions that have one; its result is in no order.
        if hasattr(flashinfer, "TopKTieBreak"):
            rule = {"deterministic": True, "tie_break": int(flashinfer.TopKTieBreak.SMALL)}
            found["flashinfer_exact"] = lambda: flashinfer.top_k_page_table_transform(
                scores, table, lengths, k, rows, **rule
            )
    return found


def scores_peer(work: IndexWork) -> Callable[[], object] | None:
    """DeepGEMM's paged scores, which SGLang uses: fp8 queries too, one token per request, pages of 64 keys."""
    module, _ = load(_DEEP_GEMM)
    is_decode = len(work.step.positions) == len(work.step.seq_lens)
    if module is None or work.key_format is not FP8_INDEX or not is_decode:
        return None
    num_tokens, heads = work.weights.shape
    queries = work.q.to(torch.float8_e4m3fn).view(num_tokens, 1, heads, -1)
    keys = work.pool.view(-1, _PER_PAGE, 1, FP8_INDEX.row_bytes)
    weights, lengths = work.weights.float(), _lengths(work).unsqueeze(1)
    pages = work.step.history_pages.to(torch.int32)
    sms = torch.cuda.get_device_properties(work.q.device).multi_processor_count
    schedule = module.get_paged_mqa_logits_metadata(lengths, _PER_PAGE, sms)
    longest = work.scores().shape[1]

    def run() -> object:
        return module.fp8_paged_mqa_logits(
            queries, keys, weights, lengths, pages, schedule, longest, False
        )

    return run
