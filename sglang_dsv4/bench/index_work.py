"""Tensors of one CSA layer's selection, and the calls that are timed."""

from dataclasses import dataclass, replace

import torch

from dsv4_kernels.index_score import naive_select_entries, naive_topk_entries
from dsv4_kernels.index_score.bound import score_bound
from dsv4_kernels.index_score.fused import score_entries, select_entries
from dsv4_kernels.index_score.workspace import IndexWorkspace, held_scores, index_workspace
from dsv4_kernels.index_topk import topk_entries
from dsv4_kernels.layout import FP8_INDEX, INDEX_DIM, RowFormat
from dsv4_kernels.row_codec import naive_load_rows, naive_store_rows
from dsv4_kernels.step import StepTensors
from sglang_dsv4.bench.cases import PAGE_TOKENS
from sglang_dsv4.spec import CSA_RATIO

# Scores of one piece of a prefill: 256 MiB.
_SCORES = 1 << 26
# Dot products that the reference holds at once.
_DOTS = 1 << 27
_KEYS_AT_ONCE = 1 << 20
# Keys of a token whose scores are checked.
_CHECKED_KEYS = 1024


@dataclass
class IndexWork:
    """One layer's index keys, queries, and output for a step."""

    step: StepTensors
    key_format: RowFormat
    pool: torch.Tensor
    q: torch.Tensor
    weights: torch.Tensor
    table: torch.Tensor
    out: torch.Tensor
    workspace: IndexWorkspace

    @property
    def visible(self) -> torch.Tensor:
        """Entries each token sees."""
        return (self.step.positions + 1) // CSA_RATIO

    def fused(self) -> None:
        """The whole selection."""
        select_entries(
            self.step, self.q, self.weights, self.pool, self.key_format, self.table, CSA_RATIO, self.out, self.workspace
        )

    @property
    def piece(self) -> tuple[int, int]:
        """First token and number of tokens of the last piece: what the workspace holds after `fused`."""
        most = len(held_scores(self.step, CSA_RATIO, self.workspace).scores)
        first = (len(self.q) - 1) // most * most
        return first, len(self.q) - first

    def score(self) -> None:
        """Queries and scores of the last piece."""
        score_entries(
            self.step,
            self.q,
            self.weights,
            self.pool,
            self.key_format,
            self.table,
            CSA_RATIO,
            self.out.shape[1],
            self.workspace,
            *self.piece,
        )

    def scores(self) -> torch.Tensor:
        """Scores of the last piece."""
        return held_scores(self.step, CSA_RATIO, self.workspace).scores[: self.piece[1]]

    def choose(self) -> None:
        """The choice of the last piece."""
        first, count = self.piece
        scores, maxima = held_scores(self.step, CSA_RATIO, self.workspace)
        topk_entries(self.step, scores[:count], maxima[:count], first, CSA_RATIO, self.out, self.workspace.groups)

    def choose_torch(self) -> torch.Tensor:
        """The choice by torch.topk, without a rule for ties, in no order: what is compared in time."""
        first, count = self.piece
        tokens = slice(first, first + count)
        scores, visible = self.scores(), self.visible[tokens].unsqueeze(1)
        entries = torch.arange(scores.shape[1], device=scores.device)
        seen = scores.masked_fill(entries >= visible, float("-inf"))
        chosen = seen.topk(min(self.out.shape[1], scores.shape[1]), sorted=False).indices
        slots = self.step.entry_slots(self.step.token_rows[tokens].unsqueeze(1), chosen, CSA_RATIO)
        return slots.masked_fill(chosen >= visible, -1).to(torch.int32)

    def choose_torch_exact(self) -> torch.Tensor:
        """The same with our rule: torch.topk over one int64 of score and entry, then a sort by entry."""
        first, count = self.piece
        tokens = slice(first, first + count)
        scores, visible = self.scores(), self.visible[tokens].unsqueeze(1)
        entries = torch.arange(scores.shape[1], device=scores.device)
        bits = (scores + 0.0).view(torch.int32).long()
        key = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) * (1 << 24) - entries
        key = key.masked_fill(entries >= visible, torch.iinfo(torch.int64).min)
        chosen = key.topk(min(self.out.shape[1], scores.shape[1]), sorted=False).indices
        chosen = chosen.masked_fill(chosen >= visible, scores.shape[1]).sort(1).values
        hidden = chosen >= visible
        rows = self.step.token_rows[tokens].unsqueeze(1)
        slots = self.step.entry_slots(rows, chosen.masked_fill(hidden, 0), CSA_RATIO)
        return slots.masked_fill(hidden, -1).to(torch.int32)

    def naive(self) -> None:
        """The reference, in pieces that fit the memory."""
        piece = max(1, _DOTS // (self.q.shape[1] * self.scores().shape[1]))
        for first in range(0, len(self.q), piece):
            part = slice(first, first + piece)
            step = replace(self.step, positions=self.step.positions[part], token_rows=self.step.token_rows[part])
            naive_select_entries(
                step, self.q[part], self.weights[part], self.pool, self.key_format, self.table, CSA_RATIO, self.out[part]
            )

    def check(self) -> None:
        """Raise unless the choice is the reference's for the kernel's own scores, and those are right to rounding.

        Queries are rounded as the kernel rounds them, which its tests check.
        """
        self.out.fill_(7)
        self.fused()
        first, count = self.piece
        visible, k = self.visible[first : first + count], self.out.shape[1]
        for at in range(0, count, 64):
            part = slice(at, min(at + 64, count))
            chosen = naive_topk_entries(self.scores()[part], visible[part], k)
            rows = self.step.token_rows[first + at : first + part.stop].unsqueeze(1)
            slots = self.step.entry_slots(rows, chosen.clamp_min(0), CSA_RATIO)
            expected = slots.masked_fill(chosen < 0, -1).to(torch.int32)
            if not torch.equal(self.out[first + at : first + part.stop, : chosen.shape[1]], expected):
                raise AssertionError(f"tokens {first + at} ..: another choice than the reference's")
        for token in {0, count // 2, count - 1}:
            if visible[token] > k:
                self._check_scores(first + token, int(visible[token]), token)

    def _check_scores(self, token: int, visible: int, row: int) -> None:
        entries = torch.arange(0, visible, max(1, visible // _CHECKED_KEYS), device=self.q.device)
        slots = self.step.index_slots(self.step.token_rows[token], entries, CSA_RATIO)
        keys = naive_load_rows(self.pool, slots, self.key_format).double()
        heads = self.q.shape[1]
        q, w = self.workspace.query[row, :heads].double(), self.workspace.weights[row, :heads]
        exact = w.double() @ (q @ keys.T).clamp_min(0)
        error = (self.scores()[row, entries] - exact).abs()
        if (error > score_bound(q, w, keys, e4m3=self.key_format is FP8_INDEX)).any():
            raise AssertionError(f"token {token}: a score is off by {error.max()}, more than rounding")

    def bytes_needed(self, first: int = 0) -> int:
        """Fewest bytes for the tokens from ``first`` on: the rows, queries and weights of those that have a choice, and every
        key that a request's tokens choose from, once.
        """
        k, heads = self.out.shape[1], self.q.shape[1]
        visible = self.visible[first:]
        scored = visible > k
        most = torch.zeros_like(self.step.seq_lens).scatter_reduce(0, self.step.token_rows[first:], visible * scored, "amax")
        query = heads * (INDEX_DIM + 1) * self.q.element_size()
        keys = int(most.sum()) * self.key_format.row_bytes
        return int(scored.sum()) * query + keys + len(visible) * k * self.out.element_size()


def make_index_work(
    step: StepTensors, heads: int, k: int, key_format: RowFormat, table: torch.Tensor, workspace: IndexWorkspace | None = None
) -> IndexWork:
    """Random keys and queries; sets of inputs may share a workspace."""
    device = table.device
    num_tokens = len(step.positions)
    rows = step.num_window_rows // CSA_RATIO
    max_entries = step.history_pages.shape[1] * PAGE_TOKENS // CSA_RATIO
    pool = torch.zeros(key_format.pool_shape(rows), dtype=key_format.storage_dtype, device=device)
    for first in range(0, rows, _KEYS_AT_ONCE):
        slots = torch.arange(first, min(first + _KEYS_AT_ONCE, rows), device=device)
        keys = torch.randn(len(slots), INDEX_DIM, device=device)
        naive_store_rows(pool, slots, keys, key_format)
    if workspace is None:
        max_scores = max(max_entries, min(_SCORES, num_tokens * max_entries))
        workspace = index_workspace(num_tokens, max_scores, heads, k, key_format, device)
    return IndexWork(
        step=step,
        key_format=key_format,
        pool=pool,
        q=torch.randn(num_tokens, heads, INDEX_DIM, device=device).bfloat16(),
        weights=torch.randn(num_tokens, heads, device=device) * (INDEX_DIM * heads) ** -0.5,
        table=table,
        out=torch.zeros(num_tokens, k, dtype=torch.int32, device=device),
        workspace=workspace,
    )
