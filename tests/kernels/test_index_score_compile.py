"""The indexer's kernels compile to machine code for every supported architecture, without a GPU."""

import pytest
import triton.language as tl

from dsv4_kernels.group_maxima.fused import group_maxima_kernel
from dsv4_kernels.index_query.fused import index_query_kernel
from dsv4_kernels.index_score.fused import index_scores_kernel
from dsv4_kernels.index_score.tuning import index_tuning, rows_together
from dsv4_kernels.index_topk.fused import GROUP, topk_entries_kernel, topk_levels, topk_registers
from dsv4_kernels.layout import BF16_INDEX, FP8_INDEX, FP32_INDEX
from dsv4_kernels.row_codec.fused import store_format
from tests.kernels.test_fused_compile import ARCHITECTURES, machine_code

HEADS, PER_PAGE, RATIO = 64, 64, 4
POOLS = {"fp8": (FP8_INDEX, "*u8"), "bf16": (BF16_INDEX, "*bf16"), "fp32": (FP32_INDEX, "*fp32")}
STEP = {"p_positions": "*i64", "first_token": "i32"}
TABLE = {"p_token_rows": "*i64", "p_pages": "*i64", "page_stride": "i32"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("query", ["*u8", "*bf16"])
def test_queries(architecture, query):
    arguments = {
        **STEP,
        "num_tokens": "i32",
        "p_q": "*bf16",
        "token_stride": "i32",
        "head_stride": "i32",
        "p_weights": "*bf16",
        "weight_stride": "i32",
        "p_cos_sin": "*fp32",
        "p_query": query,
        "p_scaled": "*fp32",
        "p_first_tiles": "*i32",
    }
    constants = {
        "HEADS": HEADS,
        "H": HEADS,
        "D": 128,
        "R": 64,
        "SCALE": 128**-0.5,
        "E": 16,
        "RATIO": RATIO,
        "K": 512,
        "UNIT": 2,
        "BS": 64,
        "BU": 256,
        "CASTS": architecture >= 89,
    }
    assert machine_code(index_query_kernel, arguments, constants, architecture, 4)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [64, 4096], ids=["decode", "prefill"])
@pytest.mark.parametrize("fmt", POOLS)
def test_scores(architecture, tokens, fmt):
    key_format, pool = POOLS[fmt]
    exact = key_format is FP32_INDEX
    arguments = {
        **STEP,
        **TABLE,
        "num_tokens": "i32",
        "p_first_tiles": "*i32",
        "p_query": pool,
        "p_weights": "*fp32",
        "p_pool": pool,
        "p_scores": "*fp32",
        "score_stride": "i32",
        "p_maxima": "*fp32",
        "maxima_stride": "i32",
    }
    tuning = index_tuning(tokens, 64, exact)
    e4m3 = tl.float8e4nv if architecture >= 89 else tl.bfloat16
    operands = {FP8_INDEX: e4m3, BF16_INDEX: tl.bfloat16, FP32_INDEX: tl.float32}
    constants = {
        "H": HEADS,
        "D": 128,
        "RATIO": RATIO,
        "PER_PAGE": PER_PAGE,
        "K": 512,
        "UNIT": tuning.unit,
        "BS": tuning.entries,
        "PART": rows_together(PER_PAGE, key_format, tuning.entries),
        "BK": 32 if exact else 128,
        "BU": 256,
        "GROUP": GROUP,
        "FORMAT": store_format(key_format),
        "OPERAND": operands[key_format],
        "CASTS": architecture >= 89,
        "STAGES": tuning.stages,
    }
    assert machine_code(
        index_scores_kernel,
        arguments,
        constants,
        architecture,
        tuning.warps,
        num_stages=tuning.stages,
        maxnreg=tuning.registers,
    )


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("k", [512, 1024])
@pytest.mark.parametrize("max_entries", [8192, 262144])
def test_topk(architecture, k, max_entries):
    size, small, levels = topk_levels(max_entries, k)
    arguments = {
        **STEP,
        **TABLE,
        "p_scores": "*fp32",
        "score_stride": "i32",
        "p_maxima": "*fp32",
        "maxima_stride": "i32",
        "p_groups": "*i32",
        "p_out": "*i32",
        "out_stride": "i32",
        "num_window_rows": "i32",
    }
    constants = {
        "RATIO": RATIO,
        "K": k,
        "SIZE": size,
        "PER_PAGE": PER_PAGE,
        "K_BLOCK": k,
        "SMALL": small,
        "GROUP": GROUP,
        "LEVELS": levels,
        "PAD": True,
    }
    registers = topk_registers(4096 if k == 512 else 1, levels)
    assert machine_code(topk_entries_kernel, arguments, constants, architecture, 8, maxnreg=registers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_maxima(architecture):
    arguments = {**STEP, "p_scores": "*fp32", "score_stride": "i32", "p_maxima": "*fp32", "maxima_stride": "i32"}
    constants = {"RATIO": RATIO, "FEWEST": 4096, "GROUP": GROUP, "BG": 512}
    assert machine_code(group_maxima_kernel, arguments, constants, architecture, 4)
