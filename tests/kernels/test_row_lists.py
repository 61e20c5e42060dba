"""Row lists: the reference against lists made token by token, the kernel against the reference."""

import pytest
import torch

from dsv4_kernels.row_lists import naive_row_lists
from dsv4_kernels.row_lists.fused import row_lists, row_lists_kernel
from tests.kernels.attention_world import CSA, HCA, KINDS, POSITIONS, WINDOW, make_selected, make_step
from tests.kernels.compiling import ARCHITECTURES, KIND, machine_code
from tests.kernels.interpreting import interpreted_checks


def by_hand(step, kind, token, selected):
    """One query's list, from its definition."""
    position, row = int(step.positions[token]), int(step.token_rows[token])
    page = step.page_tokens
    found, window = [], []
    for seen in range(max(0, position - kind.window + 1), position + 1):
        window.append(int(step.window_pages[row, seen // page]) * page + seen % page)
    if kind.most is not None:
        found += [slot for slot in selected[token].tolist() if slot >= 0]
    elif kind.ratio:
        per_page = page // kind.ratio
        for entry in range((position + 1) // kind.ratio):
            slot = int(step.history_pages[row, entry // per_page]) * per_page + entry % per_page
            found.append(step.num_window_rows + slot)
    return found + window


@pytest.mark.parametrize("page_tokens", [128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_lists_are_as_defined(kind, page_tokens):
    kind, step = KINDS[kind], make_step(POSITIONS, page_tokens)
    selected = make_selected(step, CSA) if kind is CSA else None
    width = kind.width(max(POSITIONS) + 1)
    lists = torch.full((len(POSITIONS), width), -9, dtype=torch.int32)
    naive_row_lists(step, kind, lists, selected)
    lengths = kind.lengths(step.positions).tolist()
    for token, length in enumerate(lengths):
        expected = by_hand(step, kind, token, selected)
        assert lists[token].tolist() == expected + [-9] * (width - length)
    written = torch.full((len(POSITIONS),), -9, dtype=torch.int32)
    naive_row_lists(step, kind, lists, selected, pad=True, lengths=written)
    assert written.tolist() == [max(1, length) for length in lengths] and 0 in lengths
    assert all((lists[token, length:] == -1).all() for token, length in enumerate(lengths))


def test_parts_can_be_written_apart():
    step = make_step(POSITIONS)
    selected = make_selected(step, CSA, torch.int32)
    whole, parts = (torch.full((len(POSITIONS), 640), -9, dtype=torch.int32) for _ in range(2))
    naive_row_lists(step, CSA, whole, selected)
    naive_row_lists(step, CSA, parts)
    assert not torch.equal(whole, parts)
    naive_row_lists(step, CSA, parts, selected, window=False)
    assert torch.equal(whole, parts)


def test_widths():
    assert WINDOW.width(1 << 20) == 128
    assert (CSA.width(8), CSA.width(1 << 20)) == (130, 640)
    assert HCA.width(1 << 20) == 128 + 8192
    for kind in KINDS.values():
        positions = torch.arange(-1, 3000)
        assert kind.lengths(positions).max() == kind.width(3000)
        assert kind.lengths(positions)[0] == 0


def lists_agree(positions, page_sizes, device):
    """Every kind, both index types, parts written apart and together, padded and not; untouched cells stay."""
    for page_tokens in page_sizes:
        step = make_step(positions, page_tokens, device)
        for kind in KINDS.values():
            width = kind.width(max(positions) + 1)
            for dtype in (torch.int32, torch.int64):
                wide = make_selected(step, CSA, dtype).repeat_interleave(2, 1)
                selected = wide.as_strided((len(wide), CSA.most), (wide.stride(0), 1)) if kind is CSA else None
                for options in ({}, {"pad": True}, {"window": False}, {"pad": True, "lengths": True}):
                    found = torch.full((len(positions), width + 5), -9, dtype=torch.int32, device=device)
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


def check_small(device="cpu"):
    """Around the window, blocks and a page's end."""
    lists_agree([-1, 0, 3, 127, 130, 639], (128,), device)


def check_more_lists(device="cpu"):
    """Long lists too, and both sizes of pages."""
    lists_agree(POSITIONS, (128, 256), device)


SMALL = (check_small,)
CHECKS = (check_more_lists,)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture):
    arguments = {
        "p_positions": "*i64",
        "p_token_rows": "*i64",
        "p_window_pages": "*i64",
        "p_history_pages": "*i64",
        "page_stride": "i32",
        "selected_stride": "i32",
        "p_lists": "*i32",
        "list_stride": "i32",
        "width": "i32",
        "num_window_rows": "i32",
    }
    for entries, selected, lengths in ((0, None, "*i32"), (1, None, None), (2, "*i32", "*i32")):
        given = arguments | {"p_selected": selected, "p_lengths": lengths}
        constants = KIND | {"PAGE": 256, "WRITE_WINDOW": True, "ENTRIES": entries, "PAD": True, "BC": 1024}
        assert machine_code(row_lists_kernel, given, constants, architecture, 4)
