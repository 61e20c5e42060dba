"""Inputs of the attention operations: steps over scattered pages, pools that are NaN wherever nothing may be read, and a
model of FlashInfer's kernel that works off a schedule."""

import math

import torch

from dsv4_kernels.layout import BF16_ROW
from dsv4_kernels.mla_schedule import WorkLists, max_works
from dsv4_kernels.row_codec import naive_load_rows, naive_store_rows
from dsv4_kernels.row_lists import ListKind
from dsv4_kernels.step import StepTensors

WINDOW = ListKind("window", 128)
CSA = ListKind("csa", 128, 4, 512)
HCA = ListKind("hca", 128, 128)
KINDS = {kind.name: kind for kind in (WINDOW, CSA, HCA)}
# Around the window, blocks, tiles and pages; -1 is padding.
POSITIONS = [-1, 0, 2, 3, 62, 63, 64, 126, 127, 128, 254, 255, 256, 511, 2047, 2051, 5000, -1, 639]
SCALE = 512**-0.5


def make_step(positions, page_tokens=256, device="cpu", seed=0):
    """One new token per request, pages in no order; cells of pages that nobody has reached are out of range."""
    generator = torch.Generator().manual_seed(seed)
    count, longest = len(positions), max([*positions, 0]) + 1
    pages = -(-longest // page_tokens)
    tables = [torch.randperm(count * pages, generator=generator).view(count, pages) for _ in range(2)]
    position = torch.tensor(positions, dtype=torch.int64)
    unreached = torch.arange(pages) * page_tokens > position.unsqueeze(1)
    outdated = (torch.arange(pages) + 1) * page_tokens <= position.unsqueeze(1) - 127
    return StepTensors(
        positions=position.to(device),
        token_rows=torch.arange(count, device=device),
        seq_lens=(position + 1).to(device),
        extend_lens=torch.ones_like(position).to(device),
        state_slots=torch.arange(count, device=device),
        history_pages=tables[0].masked_fill(unreached, 1 << 40).to(device),
        window_pages=tables[1].masked_fill(unreached | outdated, 1 << 40).to(device),
        page_tokens=page_tokens,
        num_window_rows=count * pages * page_tokens,
    )


def make_selected(step, kind, dtype=torch.int64, seed=0):
    """Chosen entries of each query as pool rows, ascending by entry, -1 behind; every second column of a wider tensor."""
    generator = torch.Generator().manual_seed(seed)
    positions = step.positions.cpu()
    counts = kind.num_entries(positions).tolist()
    chosen = torch.full((len(positions), kind.most), -1)
    for token, count in enumerate(counts):
        visible = (int(positions[token]) + 1) // kind.ratio
        entries = torch.randperm(visible, generator=generator)[:count].sort().values
        rows = torch.full_like(entries, token)
        slots = step.entry_slots(rows.to(step.positions.device), entries.to(step.positions.device), kind.ratio)
        chosen[token, :count] = slots.cpu()
    return chosen.to(dtype).to(step.positions.device)


def nan_pool(fmt, num_rows, device="cpu"):
    """A pool of 0xFF bytes."""
    groups, elements = fmt.pool_shape(num_rows)
    raw = torch.full((groups, elements * fmt.storage_dtype.itemsize), 0xFF, dtype=torch.uint8)
    return raw.view(fmt.storage_dtype).to(device)


def fill_pool(fmt, num_rows, used, device="cpu", seed=0, spread=1.0):
    """A pool that holds random rows where ``used`` points, and NaN elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    pool = nan_pool(fmt, num_rows)
    used = used.long().unique().cpu()
    naive_store_rows(pool, used, spread * torch.randn(len(used), 512, generator=generator), fmt)
    return pool.to(device)


def make_work(num_tokens, num_lanes, device="cpu", fill=-7):
    """Work lists to write to, poisoned."""

    def ints(count):
        return torch.full((count,), fill, dtype=torch.int32, device=device)

    works = max_works(num_tokens, num_lanes)
    return WorkLists(*(ints(works) for _ in range(6)), ints(num_lanes + 1), ints(num_tokens), ints(num_tokens))


def exact_attention(q, pool, fmt, lists, lengths):
    """fp64 attention without a sink, and its natural log-sum-exp."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for token, length in enumerate(lengths.tolist()):
        if length:
            rows = naive_load_rows(pool, lists[token, :length].long(), fmt).double()
            logits = q[token].double() @ rows.T * SCALE
            lse[token] = logits.logsumexp(-1)
            out[token] = logits.softmax(-1) @ rows
    return out, lse


def run_schedule(q, pool, lists, work, dtype=torch.float32):
    """What FlashInfer's persistent kernel does with a schedule, in fp64: result, log-sum-exp, and pieces to base 2.

    Whatever the schedule leaves out stays NaN; a piece that does not begin at a tile is refused, since the kernel would
    count its tiles wrongly.
    """
    tokens, heads, dim = q.shape
    flat = lists.flatten()
    out, lse = torch.full(q.shape, math.nan, dtype=dtype), torch.full(q.shape[:2], math.nan)
    partial = torch.full((2 * work.num_lanes * heads, dim), math.nan, dtype=dtype)
    partial_lse = torch.full((2 * work.num_lanes * heads,), math.nan)
    lane_begin = work.lane_begin.tolist()
    assert lane_begin[0] == 0 and lane_begin == sorted(lane_begin)
    for i in range(lane_begin[-1]):
        token, begin, slot, length, start, end = (
            int(column[i])
            for column in (work.query, work.list_begin, work.partial_row, work.list_length, work.key_begin, work.key_end)
        )
        assert start % 64 == 0 and end <= length
        mine = flat[begin + start : begin + end].view(1, -1)
        piece, piece_lse = exact_attention(q[token : token + 1], pool, BF16_ROW, mine, torch.tensor([end - start]))
        if slot < 0:
            assert lse[token].isnan().all(), "written twice"
            out[token], lse[token] = piece[0].to(dtype), piece_lse[0].float()
        else:
            assert partial_lse[slot : slot + heads].isnan().all(), "written twice"
            partial[slot : slot + heads] = piece[0].to(dtype)
            partial_lse[slot : slot + heads] = (piece_lse[0] / math.log(2)).float()
    return out, lse, partial.view(-1, heads, dim), partial_lse.view(-1, heads)
