"""The indexer's kernels compile to machine code for every supported architecture, without a GPU."""

import pytest
import triton.language as tl

from dsv4_kernels.index_query.fused import index_query_kernel
from dsv4_kernels.index_score.fused import index_scores_kernel, index_tuning
from dsv4_kernels.index_topk.fused import (
    BLOCK,
    topk_chunks_kernel,
    topk_entries_kernel,
    topk_tuning,
)
from dsv4_kernels.layout import BF16_INDEX, FP8_INDEX, FP32_INDEX
from dsv4_kernels.row_codec.fused import store_format
from tests.kernels.test_fused_compile import ARCHITECTURES, machine_code

HEADS, PER_PAGE, RATIO = 64, 64, 4
POOLS = {"fp8": (FP8_INDEX, "*u8"), "bf16": (BF16_INDEX, "*bf16"), "fp32": (FP32_INDEX, "*fp32")}
STEP = {"p_positions": "*i64", "first_token": "i32"}
TABLE = {"p_token_rows": "*i64", "p_pages": "*i64", "page_stride": "i32"}
CHUNKS = {"p_chunk_scores": "*fp32", "p_chunk_entries": "*i32", "candidate_stride": "i32"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_queries(architecture):
    arguments = {
        **STEP, "num_tokens": "i32", "p_q": "*bf16", "token_stride": "i32", "head_stride": "i32", "p_cos_sin": "*fp32",
        "p_query": "*bf16", "p_first_tiles": "*i32",
    }  # fmt: skip
    constants = {
        "HEADS": HEADS, "H": HEADS, "D": 128, "R": 64, "SCALE": 128**-0.5, "E": 16, "RATIO": RATIO, "K": 512,
        "UNIT": 16, "BS": 128, "BU": 256, "CASTS": architecture >= 89,
    }  # fmt: skip
    assert machine_code(index_query_kernel, arguments, constants, architecture, 4)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [64, 128, 4096], ids=["decode", "verify", "prefill"])
@pytest.mark.parametrize("fmt", POOLS)
def test_scores(architecture, tokens, fmt):
    key_format, pool = POOLS[fmt]
    exact = key_format is FP32_INDEX
    query = "*fp32" if exact else "*bf16"
    arguments = {
        **STEP, **TABLE, "num_tokens": "i32", "p_first_tiles": "*i32", "p_query": query, "p_weights": "*bf16",
        "weight_stride": "i32", "p_pool": pool, "p_scores": "*fp32", "score_stride": "i32",
    }  # fmt: skip
    tuning = index_tuning(tokens, 64, exact)
    constants = {
        "HEADS": HEADS, "H": HEADS, "D": 128, "RATIO": RATIO, "PER_PAGE": PER_PAGE, "K": 512, "UNIT": tuning.unit,
        "BS": tuning.entries, "BK": 32 if exact else 128, "BU": 256, "FORMAT": store_format(key_format),
        "OPERAND": tl.float32 if exact else tl.bfloat16, "CASTS": architecture >= 89,
    }  # fmt: skip
    assert machine_code(
        index_scores_kernel,
        arguments,
        constants,
        architecture,
        tuning.warps,
        num_stages=tuning.stages,
    )


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("k", [512, 1024])
@pytest.mark.parametrize("max_entries", [8192, 262144])
def test_topk(architecture, k, max_entries):
    size, small, warps = topk_tuning(max_entries, k)
    common = {**STEP, **CHUNKS, "p_scores": "*fp32", "score_stride": "i32"}
    constants = {"RATIO": RATIO, "K": k, "SIZE": size}
    final = {
        **constants, "PER_PAGE": PER_PAGE, "K_BLOCK": k, "SMALL": small, "CHUNKED": max_entries > BLOCK, "PAD": True,
    }  # fmt: skip
    arguments = {
        **common, **TABLE, "p_out": "*i32", "out_stride": "i32", "num_window_rows": "i32",
    }  # fmt: skip
    assert machine_code(topk_entries_kernel, arguments, final, architecture, warps)
    if max_entries > BLOCK:
        chunks = {**constants, "SPLITS": 4}
        assert machine_code(topk_chunks_kernel, common, chunks, architecture, warps)
