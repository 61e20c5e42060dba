"""The selection of CSA entries, whole and by its halves, against torch, SGLang, DeepGEMM and FlashInfer."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dsv4_kernels.index_query.fused import index_query
from dsv4_kernels.index_score.bound import score_bound
from dsv4_kernels.index_score.fused import score_entries
from dsv4_kernels.index_score.tuning import index_tuning
from dsv4_kernels.index_score.workspace import IndexWorkspace, held_scores, index_workspace
from dsv4_kernels.index_select import naive_select_entries
from dsv4_kernels.index_select.fused import select_entries
from dsv4_kernels.index_topk import naive_topk_entries
from dsv4_kernels.index_topk.fused import topk_entries
from dsv4_kernels.layout import FP8_INDEX, INDEX_DIM, INDEX_FORMATS, RowFormat
from dsv4_kernels.row_codec import naive_load_rows, naive_store_rows
from dsv4_kernels.step import StepTensors
from sglang_dsv4.bench import peer_index
from sglang_dsv4.bench.cases import PAGE_TOKENS, Case, index_cases, make_step, rope, zero_pool
from sglang_dsv4.bench.job import OURS, Job, Named, input_sets
from sglang_dsv4.bench.timing import Call
from sglang_dsv4.spec import CSA_RATIO

PEERS = peer_index.MODULES
HEADS = 64
TOPK = {"flash": 512, "pro": 1024}
_SCORES = 1 << 26  # of one piece of a prefill: 256 MiB
_DOTS = 1 << 27  # dot products that the reference holds at once
_KEYS_AT_ONCE = 1 << 20
_CHECKED_KEYS = 1024  # of a token
_CHECKED_TOKENS = 64  # at once


class IndexWork:
    """One layer's index keys, queries, and output for a step, of random numbers.

    `score` and `choose` do the last piece of the step: what the workspace holds after `fused`.

    Args:
        step (StepTensors): the step.
        k (int): entries a token chooses.
        key_format (RowFormat): of the keys.
        table (torch.Tensor): RoPE table.
        workspace (IndexWorkspace | None): one that several sets of inputs share; None makes one.
    """

    def __init__(
        self, step: StepTensors, k: int, key_format: RowFormat, table: torch.Tensor, workspace: IndexWorkspace | None = None
    ) -> None:
        self.step, self.key_format = step, key_format
        device, num_tokens = table.device, len(step.positions)
        self.pool = zero_pool(key_format, step.num_window_rows // CSA_RATIO, device)
        for slots in torch.arange(step.num_window_rows // CSA_RATIO, device=device).split(_KEYS_AT_ONCE):
            naive_store_rows(self.pool, slots, torch.randn(len(slots), INDEX_DIM, device=device), key_format)
        max_entries = step.history_pages.shape[1] * PAGE_TOKENS // CSA_RATIO
        max_scores = max(max_entries, min(_SCORES, num_tokens * max_entries))
        self.workspace = workspace or index_workspace(num_tokens, max_scores, HEADS, k, key_format, device)
        self.q = torch.randn(num_tokens, HEADS, INDEX_DIM, device=device).bfloat16()
        self.weights = torch.randn(num_tokens, HEADS, device=device) * (INDEX_DIM * HEADS) ** -0.5
        self.table, self.out = table, torch.zeros(num_tokens, k, dtype=torch.int32, device=device)
        self._inputs = (step, self.q, self.weights, self.pool, key_format, table, CSA_RATIO)
        self.visible = (step.positions + 1) // CSA_RATIO  # entries that each token sees
        most = len(held_scores(step, CSA_RATIO, self.workspace).scores)
        self.first = (num_tokens - 1) // most * most  # first token of the last piece
        self.count, self.last = num_tokens - self.first, slice(self.first, None)

    def fused(self) -> None:
        """The whole selection."""
        select_entries(*self._inputs, self.out, self.workspace)

    def score(self) -> None:
        """Queries and scores of the last piece."""
        work, k, piece = self.workspace, self.out.shape[1], (self.first, self.count)
        tuning = index_tuning(len(self.q), len(self.step.seq_lens), self.key_format.storage_dtype == torch.float32)
        inputs, query = (self.q, self.weights, self.table), (work.stored_query, work.weights, work.first_tiles)
        index_query(self.step, *inputs, CSA_RATIO, k, *query, tuning.unit, tuning.entries, *piece)
        score_entries(self.step, self.pool, self.key_format, CSA_RATIO, k, work, tuning, *piece)

    def scores(self) -> torch.Tensor:
        """Scores of the last piece."""
        return held_scores(self.step, CSA_RATIO, self.workspace).scores[: self.count]

    def choose(self) -> None:
        """The choice of the last piece."""
        held = held_scores(self.step, CSA_RATIO, self.workspace)
        maxima = held.maxima[: self.count]
        topk_entries(self.step, self.scores(), maxima, self.first, CSA_RATIO, self.out, self.workspace.groups)

    def slots(self, chosen: torch.Tensor, hidden: torch.Tensor, first: int) -> torch.Tensor:
        """Pool rows of entries that tokens from ``first`` on chose; -1 where ``hidden``."""
        rows = self.step.token_rows[first : first + len(chosen)].unsqueeze(1)
        slots = self.step.entry_slots(rows, chosen.masked_fill(hidden, 0), CSA_RATIO)
        return slots.masked_fill(hidden, -1).to(torch.int32)

    def choose_torch(self, exact: bool = False) -> torch.Tensor:
        """The choice of the last piece by torch.topk: no rule for ties, in no order; or, ``exact``, with our rule.

        Exact is topk over one int64 of score and entry, then a sort by entry.
        """
        scores, visible = self.scores(), self.visible[self.last].unsqueeze(1)
        entries = torch.arange(scores.shape[1], device=scores.device)
        key, least = scores, float("-inf")
        if exact:
            bits = (scores + 0.0).view(torch.int32).long()
            key = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) * (1 << 24) - entries
            least = torch.iinfo(torch.int64).min
        chosen = key.masked_fill(entries >= visible, least).topk(min(self.out.shape[1], len(entries)), sorted=False).indices
        if exact:
            chosen = chosen.masked_fill(chosen >= visible, len(entries)).sort(1).values
        return self.slots(chosen, chosen >= visible, self.first)

    def naive(self) -> None:
        """The reference, in pieces that fit the memory."""
        piece = max(1, _DOTS // (self.q.shape[1] * self.scores().shape[1]))
        for first in range(0, len(self.q), piece):
            part = slice(first, first + piece)
            step = replace(self.step, positions=self.step.positions[part], token_rows=self.step.token_rows[part])
            naive_select_entries(step, self.q[part], self.weights[part], *self._inputs[3:], self.out[part])

    def check(self) -> dict[str, Any]:
        """Raise unless the choice is the reference's for the kernel's own scores, and those are right to rounding.

        Queries are rounded as the kernel rounds them, which its tests check.
        """
        self.out.fill_(7)
        self.fused()
        visible, k = self.visible[self.last], self.out.shape[1]
        for at in range(0, self.count, _CHECKED_TOKENS):
            part = slice(at, min(at + _CHECKED_TOKENS, self.count))
            chosen = naive_topk_entries(self.scores()[part], visible[part], k)
            expected = self.slots(chosen, chosen < 0, self.first + at)
            if not torch.equal(self.out[self.last][part, : chosen.shape[1]], expected):
                raise AssertionError(f"tokens from {self.first + at} on: expected the reference's choice, got another")
        for row in {0, self.count // 2, self.count - 1}:
            if visible[row] > k:
                self._check_scores(row, int(visible[row]))
        return {}

    def _check_scores(self, row: int, visible: int) -> None:
        token, heads = self.first + row, self.q.shape[1]
        entries = torch.arange(0, visible, max(1, visible // _CHECKED_KEYS), device=self.q.device)
        slots = self.step.index_slots(self.step.token_rows[token], entries, CSA_RATIO)
        keys = naive_load_rows(self.pool, slots, self.key_format).double()
        q, w = self.workspace.query[row, :heads].double(), self.workspace.weights[row, :heads]
        exact = w.double() @ (q @ keys.T).clamp_min(0)
        error = (self.scores()[row, entries] - exact).abs()
        if not (error <= score_bound(q, w, keys, e4m3=self.key_format is FP8_INDEX)).all():
            raise AssertionError(f"token {token}: expected scores that are right to rounding, got one off by {error.max()}")

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


def select(case: Case, model: str, fmt: str, device: torch.device) -> Iterator[Job]:
    """The whole selection, then, where anything is scored, the scores and the choice of its last piece."""
    key_format, k, table = INDEX_FORMATS[fmt], TOPK[model], rope(case, device)
    make = partial(IndexWork, make_step(case, device), k, key_format, table)
    first: IndexWork = make()
    moved = first.bytes_needed()
    others = input_sets(partial(make, first.workspace), moved, first.pool.nbytes + 2 * first.q.numel())[1:]
    works = [first, *others]

    def job(part: str, moved: int, check: Any, calls: dict[str, list[Call]], **eager: Call) -> Job:
        shape = f"{case.shape}, k {k}"
        return Job(f"index {part}", f"{case.name}-{model}", shape, fmt, "bfloat16", moved, check, calls, eager)

    yield job("select", moved, first.check, {OURS: [work.fused for work in works]}, torch=first.naive)
    seen = first.visible[first.last]
    if not bool((seen > k).any()):
        return
    calls: dict[str, list[Call]] = {OURS: [work.score for work in works]}
    peers = [peer for peer in map(peer_index.scores, works) if peer is not None]
    if peers:
        calls["sglang"] = peers
    yield job("scores", first.bytes_needed(first.first), dict, calls)
    first.score()
    choices = {OURS: first.choose, "torch": first.choose_torch, "torch_exact": partial(first.choose_torch, exact=True)}
    choices |= peer_index.choices(first, first.scores())
    moved = 4 * (int((seen * (seen > k)).sum()) + first.count * k)
    yield job("topk", moved, dict, {name: [call] for name, call in choices.items()})


def jobs(quick: bool, device: torch.device) -> Iterator[Named]:
    """All selections."""
    for model, fmt in [("flash", "fp8")] if quick else [("flash", "fp8"), ("flash", "bf16"), ("pro", "fp8")]:
        for case in index_cases(quick):
            yield f"index {case.name}-{model}", partial(select, case, model, fmt, device)
