"""Row lists against a list made token by token, and against what the cache's own view says."""

import pytest
import torch

from dsv4_kernels.row_lists import naive_row_lists
from tests.kernels.attention_world import CSA, HCA, KINDS, POSITIONS, WINDOW, make_selected, make_step


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
