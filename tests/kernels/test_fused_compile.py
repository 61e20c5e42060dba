"""Kernels compile to machine code for every supported architecture, without a GPU."""

from itertools import product

import pytest
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv4_kernels.flush.fused import CompressorPointers, CompressorShape, StepPointers
from dsv4_kernels.flush_csa.fused import flush_csa_kernel
from dsv4_kernels.flush_csa.tuning import csa_tuning
from dsv4_kernels.flush_hca.fused import HcaWorkspace, flush_hca_kernel
from dsv4_kernels.flush_hca.tuning import hca_tuning
from dsv4_kernels.layout import BF16_INDEX, BF16_ROW, FP8_584_ROW, FP8_INDEX
from dsv4_kernels.row_codec.fused import store_format
from dsv4_kernels.window_store.fused import window_store_kernel, window_tuning

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
STEP = StepPointers(*["*i64"] * 7)
SIZES = dict.fromkeys(("num_requests", "num_tokens", "page_stride", "num_window_rows"), "i32")
FORMATS = {"fp8": (FP8_584_ROW, FP8_INDEX, "*u8"), "bf16": (BF16_ROW, BF16_INDEX, "*bf16")}


def pointers(rows, pool):
    return CompressorPointers(rows, "*fp32", "*fp32", pool, "*fp32", "*fp32", "*fp32")


def shape(dim, ratio, fmt, *, rotate=False):
    parts, ring = (4, 8) if ratio == 4 else (2, 1)
    return CompressorShape(
        dim=dim,
        rope_dim=64,
        ratio=ratio,
        token_stride=parts * dim,
        ring=ring,
        page_tokens=256,
        rotate=rotate,
        store=store_format(fmt),
    )


def aligned(signature, path=()):
    """Every pointer is 16-byte aligned, as the launchers' tensors are."""
    if isinstance(signature, str):
        return {path: [["tt.divisibility", 16]]} if signature.startswith("*") else {}
    found = {}
    for number, part in enumerate(signature):
        found |= aligned(part, (*path, number))
    return found


def machine_code(kernel, arguments, constants, architecture, warps, **options):
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    attributes = aligned(tuple(signature.values()))
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = compile_kernel(source, target=target, options={"num_warps": warps, "enable_fp_fusion": False, **options})
    return compiled.asm["cubin"]


# A long prefill's program takes a compiler half a minute. It differs from an extension's in the length of its chunks, and
# between architectures in its casts.
CSA_CASES = [*product(ARCHITECTURES, (64, 512), FORMATS), *product((86, 90, 120), (4096,), ("fp8",))]


@pytest.mark.long
@pytest.mark.parametrize(("architecture", "tokens", "formats"), CSA_CASES)
def test_flush_csa(architecture, tokens, formats):
    rows, keys, pool = FORMATS[formats]
    tuning = csa_tuning(tokens, 64)
    arguments = {
        "step": STEP,
        "main": pointers("*fp32", pool),
        "index": pointers("*fp32", pool),
        **SIZES,
        "main_eps": "fp32",
        "index_eps": "fp32",
    }
    constants = {
        "MAIN": shape(512, 4, rows),
        "INDEX": shape(128, 4, keys, rotate=True),
        "REQUESTS_ONLY": tokens <= 64,
        "CASTS": architecture >= 89,
        "SCAN": 256,
        "C": tuning.chunk,
        "MAIN_BLOCKS": tuning.main_blocks,
        "INDEX_BLOCKS": tuning.index_blocks,
    }
    assert machine_code(flush_csa_kernel, arguments, constants, architecture, tuning.warps, **tuning.options)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [64, 4096], ids=["decode", "prefill"])
def test_flush_hca(architecture, tokens):
    unroll, warps, split = hca_tuning(tokens, 64)
    work = HcaWorkspace("*fp32", "*i32")
    arguments = {"step": STEP, "comp": pointers("*bf16", "*u8"), "work": work, **SIZES, "eps": "fp32"}
    constants = {
        "S": shape(512, 128, FP8_584_ROW),
        "U": unroll,
        "SPLIT": split,
        "REQUESTS_ONLY": tokens <= 64,
        "CASTS": architecture >= 89,
        "SCAN": 256,
    }
    assert machine_code(flush_hca_kernel, arguments, constants, architecture, warps)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_window_store(architecture):
    rows, warps = window_tuning(4096)
    arguments = {
        "p_positions": "*i64",
        "p_token_rows": "*i64",
        "p_window_pages": "*i64",
        "page_stride": "i32",
        "p_kv": "*bf16",
        "token_stride": "i32",
        "p_weight": "*bf16",
        "eps": "fp32",
        "p_cos_sin": "*fp32",
        "p_pool": "*u8",
        "num_tokens": "i32",
    }
    constants = {"E": rows, "D": 512, "R": 64, "PAGE": 256, "FORMAT": store_format(FP8_584_ROW), "CASTS": architecture >= 89}
    assert machine_code(window_store_kernel, arguments, constants, architecture, warps)
