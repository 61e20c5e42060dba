"""The world of the indexer's checks: a step, its index keys and queries; what must not be read is NaN or nowhere."""

from dataclasses import dataclass

import torch

from dsv4_kernels.index_score.workspace import held_scores, index_workspace
from dsv4_kernels.index_select import naive_select_entries
from dsv4_kernels.index_select.fused import select_entries
from dsv4_kernels.layout import FP32_INDEX, INDEX_DIM
from dsv4_kernels.norm_rope import RopeSpec, rope_table
from dsv4_kernels.row_codec import naive_load_rows, naive_store_rows
from dsv4_kernels.step import StepTensors
from tests.kernels.flush_world import nan_pool

RATIO = 4
NOWHERE = 1 << 40
# (tokens before, new tokens): below and above k = 16 entries, on and off a block's end, an empty request, one fresh.
REQUESTS = ((300, 1), (700, 5), (0, 3), (60, 9), (90, 0), (511, 1), (64, 20))
K, HEADS = 16, 4
# For a short run: a decode step, an extension over two ends of blocks, requests that see few entries or none.
FEW = ((300, 1), (66, 20), (40, 2), (0, 3))
# Rows of `hard_scores`, and scores of each.
HARD, LENGTH = 12, 704


@dataclass
class IndexWorld:
    """A step, its index keys, and its queries."""

    step: StepTensors
    pool: torch.Tensor
    fmt: object
    q: torch.Tensor
    weights: torch.Tensor
    table: torch.Tensor
    max_entries: int

    @property
    def visible(self):
        return (self.step.positions + 1) // RATIO

    def workspace(self, max_tokens=None, k=K):
        tokens = max_tokens or len(self.q)
        scores, heads = tokens * self.max_entries, self.weights.shape[1]
        return index_workspace(tokens, scores, heads, k, self.fmt, self.q.device)

    def scores(self, workspace):
        """What a workspace holds, ``[T, entries]``."""
        return held_scores(self.step, RATIO, workspace).scores

    def fused(self, workspace=None, tuning=None, k=K, **options):
        """The chosen rows, and the workspace."""
        workspace = self.workspace(k=k) if workspace is None else workspace
        out = torch.full((len(self.q), k), 7, dtype=torch.int32, device=self.q.device)
        select_entries(
            self.step, self.q, self.weights, self.pool, self.fmt, self.table, RATIO, out, workspace, tuning, **options
        )
        return out, workspace

    def naive(self, k=K, numbering=None):
        out = torch.full((len(self.q), k), 7, dtype=torch.int32, device=self.q.device)
        naive_select_entries(self.step, self.q, self.weights, self.pool, self.fmt, self.table, RATIO, out, numbering)
        return out

    def entries_of(self, rows):
        """The entries that rows of the row pool hold, -1 for none."""
        count, most = self.step.history_pages.shape[0], int(self.step.seq_lens.max()) // RATIO
        request = torch.arange(count, device=rows.device).unsqueeze(1)
        entries = torch.arange(most, device=rows.device).expand(count, most)
        reached = entries < (self.step.seq_lens // RATIO).unsqueeze(1)
        slots = self.step.entry_slots(request, entries, RATIO)[reached]
        held = torch.full((int(slots.max()) + 1,), -1, device=rows.device)
        held[slots] = entries[reached]
        return held[rows.long().clamp_min(0)].masked_fill(rows < 0, -1)

    def rows_of(self, chosen):
        """Entries ``[T, k]``, -1 for none, as rows of the row pool."""
        rows = self.step.token_rows.unsqueeze(1)
        slots = self.step.entry_slots(rows, chosen.clamp_min(0), RATIO)
        return slots.masked_fill(chosen < 0, -1).to(torch.int32)

    def keys(self, token):
        """The decoded keys that a token sees, fp64."""
        entries = torch.arange(int(self.visible[token]), device=self.q.device)
        rows = torch.full_like(entries, int(self.step.token_rows[token]))
        slots = self.step.index_slots(rows, entries, RATIO)
        return naive_load_rows(self.pool, slots, self.fmt).double()


def make_world(fmt, requests=REQUESTS, heads=HEADS, *, device="cpu", exact=False, page_tokens=128, seed=0, dtype=torch.float32):
    """Random queries and keys; ``exact`` ones make every dot, and so every score, exact in any order of additions.

    Pages are in no order. Keys past the last closed block, page cells past the last page and the queries of padding tokens
    (one in the middle, two at the end) would give themselves away.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = [row for row, (_, count) in enumerate(requests) for _ in range(count)]
    positions = [start + i for start, count in requests for i in range(count)]
    for at in (len(rows) // 2, len(rows) + 1, len(rows) + 2):
        rows.insert(at, 0)
        positions.insert(at, -1)
    lengths = [start + count for start, count in requests]
    per_page, pages = page_tokens // RATIO, -(-max(lengths) // page_tokens) + 1
    count = len(requests)
    table = torch.randperm(count * pages + 2, generator=generator)[: count * pages].view(count, -1)
    for row, length in enumerate(lengths):
        table[row, -(-length // page_tokens) :] = NOWHERE

    def tensor(values):
        return torch.tensor(values, dtype=torch.int64, device=device)

    table = table.to(device)
    step = StepTensors(
        positions=tensor(positions),
        token_rows=tensor(rows),
        seq_lens=tensor(lengths),
        extend_lens=tensor([n for _, n in requests]),
        state_slots=tensor(range(count)),
        history_pages=table,
        window_pages=table.clone(),
        page_tokens=page_tokens,
        num_window_rows=1000,
    )
    pool = nan_pool(fmt, (count * pages + 2) * per_page, device)
    tokens = len(rows)
    q = torch.full((tokens, heads, INDEX_DIM), float("nan"))
    real = torch.tensor(positions) >= 0
    if exact:
        q[real] = 0.0
        hot = torch.randint(0, 64, (tokens, heads), generator=generator)
        size = torch.randint(1, 4, (tokens, heads), generator=generator).float()
        q = torch.where(real.view(-1, 1, 1), q.scatter(2, hot.unsqueeze(2), size.unsqueeze(2)), q)
        weights = 2.0 ** torch.randint(-1, 2, (tokens, heads), generator=generator)
        weights *= torch.randint(0, 2, (tokens, heads), generator=generator) * 2 - 1
    else:
        q[real] = normal(int(real.sum()), heads, INDEX_DIM)
        weights = normal(tokens, heads)
    for row, length in enumerate(lengths):
        entries = torch.arange(length // RATIO, device=device)
        if len(entries):
            keys = normal(len(entries), INDEX_DIM)
            if exact:
                keys = torch.randint(-1, 2, keys.shape, generator=generator).float()
                if fmt is FP32_INDEX:
                    hot = torch.randint(0, INDEX_DIM, (len(entries), 1), generator=generator)
                    keys = torch.zeros_like(keys).scatter(1, hot, 1.0)
            slots = step.index_slots(torch.full_like(entries, row), entries, RATIO)
            naive_store_rows(pool, slots, keys.to(device), fmt)
    return IndexWorld(
        step,
        pool,
        fmt,
        q.to(dtype).to(device),
        weights.to(dtype).to(device),
        rope_table(RopeSpec(160000.0, 64), max(lengths) + 1, device),
        pages * per_page,
    )


def exact_world(fmt, **options):
    """Where keys are fp32 a rotated query has 24 bits: dots of one product and scores of one head are exact."""
    return make_world(fmt, heads=1 if fmt is FP32_INDEX else HEADS, exact=True, **options)


def hard_scores(device):
    """Rows of scores with many ties, zeros of both signs, subnormals, infinities, and every bit of a float in play."""
    generator = torch.Generator().manual_seed(5)
    length = LENGTH
    rows = [
        torch.zeros(length),
        torch.where(torch.arange(length) % 3 == 0, 0.0, -0.0),
        torch.randint(0, 3, (length,), generator=generator) - 1.0,
        torch.randn(length, generator=generator),
        -torch.rand(length, generator=generator),
        torch.randn(length, generator=generator) * 1e-40,
        torch.randint(0, 2, (length,), generator=generator) * float("inf"),
        -torch.randint(0, 2, (length,), generator=generator) * float("inf"),
        torch.arange(length).float(),
        torch.arange(length).flip(0).float(),
        torch.arange(length) // 7 * 1.0,
        1.0 + torch.randint(0, 40, (length,), generator=generator) * 2.0**-23,
    ]
    scores = torch.stack(rows).nan_to_num(0.0, float("inf"), float("-inf"))
    return scores.repeat(5, 1).to(device)
