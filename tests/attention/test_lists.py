"""Chunks, host lengths, buffers and the reading of a plan."""

import pytest
import torch

from sglang_dsv4.attention import EagerAttention, HostLengths
from sglang_dsv4.attention.flashinfer_schedule import OwnSchedule, Partials, check_stock_plan, read_stock_plan
from sglang_dsv4.attention.host_lengths import host_positions
from sglang_dsv4.attention.row_list_kinds import MAX_CHUNK_TOKENS, chunks
from sglang_dsv4.cache import CompressedKVCache
from tests.attention.flashinfer_model import MAX_WORKS, Module
from tests.cache.driver import make_spec

CPU = torch.device("cpu")


@pytest.mark.parametrize(("tokens", "width"), [(0, 128), (1, 640), (20_000, 640), (9_000, 8320), (300, 1 << 20)])
@pytest.mark.parametrize("row_bytes", [0, 1024])
def test_chunks_cover_every_query_once_and_fit(tokens, width, row_bytes):
    parts = list(chunks(tokens, width, decoded_row_bytes=row_bytes))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(tokens))
    most = max((part.stop - part.start for part in parts), default=0)
    # FlashInfer's planner makes a work per query, and pieces: fewer than there are multiprocessors on any GPU.
    assert most + 1024 <= MAX_WORKS and most <= MAX_CHUNK_TOKENS
    assert most <= 1 or most * width * (row_bytes or 4) <= 256 << 20


def test_host_positions():
    lengths = HostLengths((5, 300, 7), (2, 3, 0))
    assert lengths.positions().tolist() == [3, 4, 297, 298, 299]
    assert HostLengths((), ()).positions().tolist() == []
    cache = CompressedKVCache(make_spec(), num_pages=4, max_requests=2)
    first, second = cache.open(), cache.open()
    plan = cache.plan([(first, 3), (second, 260)])
    assert torch.equal(host_positions(plan, None), plan.step.positions)
    assert torch.equal(host_positions(plan, HostLengths((3, 4), (3, 4)))[:8], torch.tensor([0, 1, 2, 0, 1, 2, 3, -1]))
    with pytest.raises(ValueError, match="expected lengths of at most 263 new tokens, got 264"):
        host_positions(plan, HostLengths((264,), (264,)))


def test_kinds():
    window, csa, hca = EagerAttention(CompressedKVCache(make_spec(), num_pages=1, max_requests=1)).distinct_kinds
    assert (window.ratio, csa.ratio, hca.ratio) == (0, 4, 128)
    assert (window.most, csa.most, hca.most) == (None, 16, None)


@pytest.mark.parametrize("heads", [8, 64, 128])
def test_our_schedule_lies_where_its_plan_says(heads):
    """The plan's offsets and the work lists are two views of one workspace, and no section overlaps another."""
    partials = Partials(heads, 512, 132, CPU)
    own = OwnSchedule(50, partials, CPU)
    blocks, lanes, *offsets = own.plan_info
    assert (blocks, lanes) == ((2, 66) if heads == 128 else (1, 132))
    fields = dict(zip(("query", "list_begin", "partial_row"), offsets, strict=False))
    fields |= {"list_length": offsets[9], "key_begin": offsets[11], "key_end": offsets[12], "lane_begin": offsets[13]}
    ranges = []
    for name, offset in fields.items():
        view = getattr(own.work, name)
        assert view.data_ptr() - own.ints.data_ptr() == offset and offset % 16 == 0
        ranges.append((offset, offset + view.nbytes))
    ranges.sort()
    assert all(end <= begin for (_, end), (begin, _) in zip(ranges, ranges[1:], strict=False))
    ones, zeros = (own.ints[at : at + 4 * 116].view(torch.int32) for at in (offsets[8], offsets[10]))
    assert (ones == 1).all() and not zeros.any()
    assert offsets[3:8] == [offsets[10]] * 5
    assert partials.partial.shape == (2 * lanes, heads, 512)
    assert partials.partial_lse.data_ptr() - partials.floats.data_ptr() == offsets[15]
    # FlashInfer's planner asks for this much of the float workspace.
    assert len(partials.floats) >= 2 * lanes * blocks * 64 * (512 * 2 + 4)


def test_a_plan_of_the_planner_is_read():
    ints = torch.zeros(8 << 20, dtype=torch.uint8)
    lengths = torch.tensor([640, 1, 0, 5000], dtype=torch.int32)
    starts = torch.arange(5, dtype=torch.int32)
    info = Module().plan(ints, starts, starts * 5003, lengths, 64)
    works = read_stock_plan(info, ints)
    assert len(works) == 5  # the longest in two
    check_stock_plan(works, lengths.tolist(), 5003)
    with pytest.raises(ValueError, match="query 3 ends at 5000, expected 5001"):
        check_stock_plan(works, [640, 1, 0, 5001], 5003)
    with pytest.raises(ValueError, match="expected lists of stride 5004"):
        check_stock_plan(works, lengths.tolist(), 5004)
    missing = [work for work in works if work[2] != 0 or work[0] != 3]
    with pytest.raises(ValueError, match="query 3 goes on at 2560, expected 0"):
        check_stock_plan(missing, lengths.tolist(), 5003)
    with pytest.raises(ValueError, match="query 1 goes on at 0, expected 1"):
        check_stock_plan([*works, next(work for work in works if work[0] == 1)], lengths.tolist(), 5003)
    with pytest.raises(ValueError, match="expected 18 numbers, got 17"):
        read_stock_plan(info[:-1], ints)
