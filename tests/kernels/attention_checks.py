"""Checks of the attention operations' kernels against their references, for Triton's CPU interpreter and a GPU alike.

Run as a program it makes every check on the CPU and prints ``{check: "" or its fault}``.
"""

import itertools
import math

import torch

from dsv4_kernels.layout import BF16_ROW, FP8_584_ROW
from dsv4_kernels.mla_schedule import naive_mla_schedule
from dsv4_kernels.mla_schedule.fused import mla_schedule
from dsv4_kernels.norm_rope import RopeSpec, rope_table
from dsv4_kernels.page_decode import naive_page_decode, num_page_rows
from dsv4_kernels.page_decode.fused import page_decode
from dsv4_kernels.row_gather import naive_row_gather
from dsv4_kernels.row_gather.fused import row_gather
from dsv4_kernels.row_lists import naive_row_lists
from dsv4_kernels.row_lists.fused import row_lists
from dsv4_kernels.sink_rope import Splits, naive_sink_rope
from dsv4_kernels.sink_rope import fused as sink_rope_fused
from dsv4_kernels.sink_rope.fused import sink_rope
from tests.kernels.attention_world import CSA, HCA, KINDS, POSITIONS, fill_pool, make_selected, make_step, make_work
from tests.kernels.interpreting import make_checks

INF, NAN = math.inf, math.nan


def check_row_lists(device="cpu"):
    """Every kind, both index types, parts written apart and together, padded and not; untouched cells stay."""
    for page_tokens in (128, 256):
        step = make_step(POSITIONS, page_tokens, device)
        for kind in KINDS.values():
            width = kind.width(max(POSITIONS) + 1)
            for dtype in (torch.int32, torch.int64):
                wide = make_selected(step, CSA, dtype).repeat_interleave(2, 1)
                selected = wide.as_strided((len(wide), CSA.most), (wide.stride(0), 1)) if kind is CSA else None
                for options in ({}, {"pad": True}, {"window": False}, {"pad": True, "lengths": True}):
                    found = torch.full((len(POSITIONS), width + 5), -9, dtype=torch.int32, device=device)
                    expected = found.clone()
                    lengths = [None, None]
                    if options.pop("lengths", False):
                        filled = torch.full_like(found[0, :1], -9).repeat(2, len(found) + 1)
                        lengths = [filled[0, :-1], filled[1, :-1]]
                    row_lists(step, kind, found[:, :width], selected, lengths=lengths[0], **options)
                    naive_row_lists(step, kind, expected[:, :width], selected, lengths=lengths[1], **options)
                    case = f"{kind.name} {page_tokens} {dtype} {options}"
                    assert torch.equal(found, expected), case
                    if lengths[0] is not None:
                        assert torch.equal(filled[0], filled[1]) and filled[0, -1] == -9, case
            row_lists(step, kind, found[:0, :width], selected)


def splits_of(tokens, heads, dim, counts, device, dtype=torch.bfloat16):
    """Pieces of every count; a slot that belongs to no piece is NaN, and some pieces are empty."""
    lanes = sum(counts) + 1
    partial = torch.full((2 * lanes, heads, dim), NAN, dtype=dtype)
    partial_lse = torch.full((2 * lanes, heads), NAN)
    first, lane = [], 0
    for count in counts:
        first.append(lane)
        slots = [2 * lane + 1] + [2 * (lane + i) for i in range(1, count)]
        partial[slots] = torch.randn(count, heads, dim).to(dtype)
        partial_lse[slots] = 5 * torch.randn(count, heads)
        if count > 2:
            partial_lse[slots[1], 0] = -INF
        if count == 2:
            partial_lse[slots, 1] = -INF  # a head without keys at all
        lane += count
    ints = {"dtype": torch.int32, "device": device}
    return Splits(torch.tensor(first, **ints), torch.tensor(counts, **ints), partial.to(device), partial_lse.to(device))


def check_sink_rope(device="cpu"):
    """Sinks of every kind, pieces, padding and no keys; one rounding apart at most, and a wrong position is seen."""
    heads = 8 if device == "cpu" else 64
    table = rope_table(RopeSpec(10000.0, 64), 701, device)
    positions = torch.tensor([5, -1, 0, 699, 64, 3], device=device)
    sink = torch.randn(heads, device=device)
    sink[:3] = torch.tensor([INF, -INF, 0.0])
    chosen = sink_rope_fused.sink_rope_tuning
    for tuning in (None, (4, 2, 4), (8, 1, 8)):
        for counts in (None, [1, 1, 2, 5, 1, 11]):
            out = torch.randn(6, heads, 512, device=device).bfloat16()
            lse = 3 * torch.randn(6, heads, device=device)
            out[4], lse[4] = 0.0, -INF
            splits = None
            if counts is not None:
                splits = splits_of(6, heads, 512, counts, device)
                several = torch.tensor(counts, device=device) > 1
                out[several], lse[several] = NAN, NAN
            for given_sink, cos_sin in ((sink, table), (None, table), (sink, None)):
                found, expected = out.clone(), out.float()
                if tuning is not None:
                    sink_rope_fused.sink_rope_tuning = lambda *_, best=tuning: best
                sink_rope(found, lse, given_sink, positions, cos_sin, splits)
                sink_rope_fused.sink_rope_tuning = chosen
                naive_sink_rope(expected, lse, given_sink, positions, cos_sin, splits)
                assert torch.isfinite(found).all(), (tuning, counts)
                # Half a bf16 step is at most 2^-8 of the value; exponentials and sums add 2^-18 of the largest.
                allowed = expected.abs() * 2.0**-8 + expected.abs().max() * 2.0**-18
                assert ((found.float() - expected).abs() <= allowed).all(), (tuning, counts)
                if cos_sin is not None:
                    wrong = out.float()
                    naive_sink_rope(wrong, lse, given_sink, positions + 1, cos_sin, splits)
                    assert ((found.float() - wrong).abs() > allowed).any(), "a wrong position was not seen"
                if tuning is not None and device == "cpu":
                    break


SCHEDULES = [
    ("equal", [5000] * 8, 132),
    ("one", [900_000], 132),
    ("rest of a round", [5000] * 21, 16),
    ("rounds", [5000] * 32, 16),
    ("short", [5, 70, -1, 200, 127], 16),
    ("unequal", [100] * 20 + [900_000] + [300] * 20, 16),
    ("few lanes", [3, 1000, 17_000, 900_000, -1, 5], 2),
    ("one lane", [3, 1000, -1], 1),
    ("prefill", list(range(300)), 16),
]


def check_mla_schedule(device="cpu"):
    """Every number of every lane equals the reference's, and nothing else is written."""
    for name, positions, lanes in SCHEDULES:
        tensor = torch.tensor(positions, device=device)
        for kind, split in itertools.product(KINDS.values(), (True, False)):
            found, expected = (make_work(len(positions), lanes, device) for _ in range(2))
            mla_schedule(tensor, kind, 9000, 64, found, split)
            naive_mla_schedule(tensor, kind, 9000, 64, expected, split)
            for field in found.__dataclass_fields__:
                same = torch.equal(getattr(found, field), getattr(expected, field))
                assert same, f"{name} {kind.name} {lanes} lanes, split {split}: {field}"


def check_row_gather(device="cpu"):
    """Decoded rows, to the bit; unlisted places stay, and rows that no list names may be NaN."""
    step = make_step(POSITIONS[:12], 128, device)
    for kind in (CSA, HCA):
        width = kind.width(256)
        lists = torch.full((12, width), 1 << 30, dtype=torch.int32, device=device)
        naive_row_lists(step, kind, lists, make_selected(step, CSA) if kind is CSA else None)
        lengths = kind.lengths(step.positions)
        used = lists[torch.arange(width, device=device) < lengths.unsqueeze(1)]
        rows = step.num_window_rows + step.num_window_rows // kind.ratio
        pool = fill_pool(FP8_584_ROW, rows, used, device, spread=40.0)
        found = torch.full((12 * width, 512), -3.0, dtype=torch.bfloat16, device=device)
        expected = found.clone()
        row_gather(pool, FP8_584_ROW, lists, kind, step.positions, found)
        naive_row_gather(pool, FP8_584_ROW, lists, lengths, expected)
        assert torch.equal(found, expected), kind.name
    try:
        row_gather(pool, BF16_ROW, lists, kind, step.positions, found)
    except ValueError as fault:
        assert "expected fp8_584 rows" in str(fault)
    else:
        raise AssertionError("bf16 rows were taken")


def check_page_decode(device="cpu"):
    """Pages in no order, to the bit; whatever lies in others may be NaN, and so may rows within that were never stored."""
    num_window_rows, wrong = 4 * 256, 0
    for page_tokens, ratio, stored in itertools.product((128, 256), (0, 4, 128), (1.0, 0.6)):
        per_page = page_tokens // ratio if ratio else 0
        for window, history in (([2, 0], [5, 1, 6]), ([1], []), ([], [0, 3]), ([], [])):
            pages = [torch.tensor(part, dtype=torch.int64) for part in (window, history)]
            window_slots = pages[0].unsqueeze(1) * page_tokens + torch.arange(page_tokens)
            slots = pages[1].unsqueeze(1) * per_page + torch.arange(per_page)
            used = torch.cat([window_slots.flatten(), num_window_rows + slots.flatten()])
            used = used[torch.rand(len(used)) < stored]
            rows = num_window_rows + 7 * per_page
            pool = fill_pool(FP8_584_ROW, rows, used, device, spread=40.0)
            pages = [part.to(device) for part in pages]
            count = num_page_rows(len(window), len(history), page_tokens, ratio)
            found = torch.full((count + 3, 512), -3.0, dtype=torch.bfloat16, device=device)
            expected = found.clone()
            shape = (page_tokens, ratio, num_window_rows)
            page_decode(pool, FP8_584_ROW, *pages, *shape, found[:count])
            naive_page_decode(pool, FP8_584_ROW, *pages, *shape, expected[:count])
            missing = expected.isnan()
            assert missing.any() == (len(used) < count), (page_tokens, ratio, window)
            assert torch.equal(found.isnan(), missing), (page_tokens, ratio, window)
            same = torch.equal(found[~missing], expected[~missing])
            assert same, (page_tokens, ratio, window)
            if count and stored == 1.0:
                page_decode(pool, FP8_584_ROW, pages[0].flip(0), pages[1].flip(0), *shape, found[:count])
                wrong += not torch.equal(found, expected)
    assert wrong, "another order of pages was not seen"
    for fmt, rows, text in ((BF16_ROW, 256, "expected fp8_584 rows"), (FP8_584_ROW, 3, "rows: ")):
        one, none = pages[0].new_zeros(1), pages[0].new_zeros(0)
        try:
            page_decode(pool, fmt, one, none, 256, 4, num_window_rows, found.new_zeros(rows, 512))
        except ValueError as fault:
            assert text in str(fault)
        else:
            raise AssertionError(f"taken: {text}")


CHECKS = {
    "row lists": check_row_lists,
    "sink and rope": check_sink_rope,
    "schedule": check_mla_schedule,
    "row gather": check_row_gather,
    "page decode": check_page_decode,
}


if __name__ == "__main__":
    make_checks(CHECKS)
