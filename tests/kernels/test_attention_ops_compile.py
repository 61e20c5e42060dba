"""The attention operations' kernels compile to machine code for every supported architecture, without a GPU."""

import pytest

from dsv4_kernels.layout import FP8_584_ROW
from dsv4_kernels.mla_schedule.fused import WorkPointers, mla_schedule_kernel
from dsv4_kernels.page_decode.fused import _ROWS, page_decode_kernel
from dsv4_kernels.row_codec.fused import store_format
from dsv4_kernels.row_gather.fused import row_gather_kernel
from dsv4_kernels.row_lists.fused import row_lists_kernel
from dsv4_kernels.sink_rope.fused import sink_rope_kernel, sink_rope_tuning
from tests.kernels.test_fused_compile import ARCHITECTURES, machine_code

pytestmark = [pytest.mark.long, pytest.mark.parametrize("architecture", ARCHITECTURES)]
KIND = {"WINDOW": 128, "RATIO": 4, "MOST": 512}


def test_row_lists(architecture):
    arguments = {
        "p_positions": "*i64",
        "p_token_rows": "*i64",
        "p_window_pages": "*i64",
        "p_history_pages": "*i64",
        "page_stride": "i32",
        "p_selected": "*i32",
        "selected_stride": "i32",
        "p_lists": "*i32",
        "list_stride": "i32",
        "p_lengths": "*i32",
        "width": "i32",
        "num_window_rows": "i32",
    }
    for entries in (0, 1, 2):
        constants = KIND | {
            "PAGE": 256,
            "WRITE_WINDOW": True,
            "ENTRIES": entries,
            "PAD": True,
            "WRITE_LENGTHS": entries != 1,
            "BC": 1024,
        }
        assert machine_code(row_lists_kernel, arguments, constants, architecture, 4)


@pytest.mark.parametrize("tokens", [8, 64, 256])
@pytest.mark.parametrize("lanes", [0, 132])
def test_sink_rope(architecture, tokens, lanes):
    heads, pieces, warps = sink_rope_tuning(tokens, lanes)
    arguments = {
        "p_out": "*bf16",
        "p_lse": "*fp32",
        "p_sink": "*fp32",
        "p_positions": "*i64",
        "p_cos_sin": "*fp32",
        "p_first_lane": "*i32",
        "p_num_pieces": "*i32",
        "p_partial": "*bf16",
        "p_partial_lse": "*fp32",
        "num_heads": "i32",
    }
    for rope, sink in ((64, True), (0, True), (64, False)):
        constants = {
            "D": 512,
            "R": rope,
            "RB": rope or 2,
            "HAS_SINK": sink,
            "HAS_SPLITS": lanes > 0,
            "BH": heads,
            "BJ": pieces,
            "CASTS": architecture >= 89,
        }
        assert machine_code(sink_rope_kernel, arguments, constants, architecture, warps)


@pytest.mark.parametrize("block", [32, 8192])
def test_mla_schedule(architecture, block):
    arguments = {
        "p_positions": "*i64",
        "num_tokens": "i32",
        "list_stride": "i32",
        "num_heads": "i32",
        "work": WorkPointers(*["*i32"] * len(WorkPointers._fields)),
        "num_lanes": "i32",
    }
    constants = KIND | {"SPLIT": True, "TILE": 64, "SECOND": 2, "MANY": 2, "PIECE": 12, "BT": block}
    assert machine_code(mla_schedule_kernel, arguments, constants, architecture, 4 if block == 32 else 8)


def test_row_gather(architecture):
    arguments = {
        "p_pool": "*u8",
        "p_positions": "*i64",
        "p_lists": "*i32",
        "list_stride": "i32",
        "width": "i32",
        "p_rows": "*bf16",
    }
    constants = KIND | {"FORMAT": store_format(FP8_584_ROW), "D": 512, "BC": 8, "CASTS": architecture >= 89}
    assert machine_code(row_gather_kernel, arguments, constants, architecture, 4)


@pytest.mark.parametrize("per_page", [0, 2, 64])
def test_page_decode(architecture, per_page):
    arguments = {
        "p_pool": "*u8",
        "p_window_pages": "*i64",
        "p_history_pages": "*i64",
        "num_rows": "i32",
        "window_end": "i32",
        "num_window_rows": "i32",
        "p_rows": "*bf16",
    }
    constants = {
        "PAGE": 256,
        "PER_PAGE": per_page,
        "FORMAT": store_format(FP8_584_ROW),
        "D": 512,
        "BR": _ROWS,
        "CASTS": architecture >= 89,
    }
    assert machine_code(page_decode_kernel, arguments, constants, architecture, 4)
