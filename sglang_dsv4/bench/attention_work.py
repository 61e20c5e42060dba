"""A cache of layers of one kind over random rows, and one step over it."""

from dataclasses import dataclass

import torch

from dsv4_kernels.layout import BF16_ROW, RowFormat
from dsv4_kernels.row_codec import naive_load_rows, naive_store_rows
from dsv4_kernels.row_lists import ListKind
from dsv4_kernels.step import StepTensors
from sglang_dsv4.attention.base import HostLengths
from sglang_dsv4.attention.row_list_kinds import kind_of
from sglang_dsv4.bench.cases import PAGE_TOKENS
from sglang_dsv4.cache import Capacity, ExternalKVCache, PageTables, StepPlan
from sglang_dsv4.spec import CacheSpec

RATIOS = {"window": 0, "csa": 4, "hca": 128}
_UNREACHED = 1 << 40
_PATTERN_ROWS = 8192


@dataclass(frozen=True)
class AttentionCase:
    """One step of one kind of layer.

    Attributes:
        kind (str): ``"window"``, ``"csa"`` or ``"hca"``.
        starts (tuple[int, ...]): tokens each request had before.
        extends (tuple[int, ...]): new tokens of each request.
        heads (int): query heads.
        topk (int): entries a CSA query attends to.
    """

    kind: str
    starts: tuple[int, ...]
    extends: tuple[int, ...]
    heads: int = 64
    topk: int = 512

    @property
    def num_tokens(self) -> int:
        """Queries."""
        return sum(self.extends)

    @property
    def longest(self) -> int:
        """Longest sequence."""
        return max(s + n for s, n in zip(self.starts, self.extends, strict=True))

    @property
    def name(self) -> str:
        """Kind and shape in a few characters."""
        keys = f"-top{self.topk}" if self.kind == "csa" else ""
        batch, tokens = len(self.starts), self.num_tokens
        step = f"b{batch}" if batch == tokens else f"prefill{tokens}"
        return f"{self.kind}{keys}-{self.longest}-h{self.heads}-{step}"


class AttentionWork:
    """Layers that differ in their rows, queries and choices, so that attending one after another finds nothing in the L2 cache."""

    def __init__(self, case: AttentionCase, num_layers: int, row_format: str, device: torch.device, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator(device=device).manual_seed(seed)
        batch, pages = len(case.starts), -(-case.longest // PAGE_TOKENS)
        window_pages, window_count = self._window_table(pages, device, generator)
        config = {
            "model_type": "deepseek_v4",
            "num_hidden_layers": num_layers,
            "compress_ratios": [RATIOS[case.kind]] * num_layers,
            "index_topk": case.topk,
            "sliding_window": 128,
            "head_dim": 512,
            "qk_rope_head_dim": 64,
            "index_head_dim": 128,
            "rope_theta": 10000,
            "compress_rope_theta": 160000,
            "rope_scaling": {
                "type": "yarn",
                "factor": 16,
                "original_max_position_embeddings": 65536,
                "beta_fast": 32,
                "beta_slow": 1,
            },
        }
        spec = CacheSpec.from_hf(config, row_format=row_format, page_tokens=PAGE_TOKENS)
        capacity = Capacity(batch * pages, window_count, 1, pages * PAGE_TOKENS)
        self.cache = ExternalKVCache(spec, capacity, device)
        self.kind: ListKind = kind_of(spec, spec.layers[0])
        for layer in self.cache.layers:
            fill(layer.pool, spec.rows, generator)
        starts, extends = torch.tensor(case.starts), torch.tensor(case.extends)
        rows = torch.repeat_interleave(torch.arange(batch), extends)
        first = torch.cumsum(extends, 0) - extends
        positions = torch.arange(case.num_tokens) - first[rows] + starts[rows]
        history = torch.randperm(batch * pages, device=device, generator=generator).view(batch, pages)
        self.lengths = HostLengths((starts + extends).tolist(), extends.tolist())
        self.plan: StepPlan = self.cache.plan_tables(
            positions=positions.to(device),
            token_rows=rows.to(device),
            seq_lens=(starts + extends).to(device),
            extend_lens=extends.to(device),
            state_slots=torch.zeros(batch, dtype=torch.int64, device=device),
            tables=PageTables(history=history, window=window_pages),
        )
        shape = (case.num_tokens, case.heads, 512)
        self.q = [torch.randn(shape, device=device, generator=generator).bfloat16() for _ in range(num_layers)]
        self.sink = torch.randn(case.heads, device=device, generator=generator)
        chosen = [self._choose(generator) for _ in range(num_layers)] if case.kind == "csa" else [None] * num_layers
        self.selected: list[torch.Tensor | None] = chosen

    def indices(self, layer_id: int) -> torch.Tensor:
        """Listed pool rows of every query, -1 behind them; from the references."""
        rows, ratio = self.plan.rows, self.cache.layers[layer_id].ratio
        entries = self.selected[layer_id] if self.case.kind == "csa" else rows.every_entry(ratio) if ratio else None
        return rows.window if entries is None else torch.cat([rows.window, entries.long()], 1)

    def rows(self, layer_id: int, query: int) -> torch.Tensor:
        """The listed rows of one query, fp32."""
        listed = self.indices(layer_id)[query]
        pool = self.cache.layers[layer_id].pool
        return naive_load_rows(pool, listed[listed >= 0], self.cache.spec.rows)

    def selected_by(self, layer_id: int, numbering: StepTensors | None) -> torch.Tensor | None:
        """The chosen rows of a layer as `Attention.numbering` numbers them; None in layers that choose none."""
        chosen, step = self.selected[layer_id], self.plan.step
        if chosen is None or numbering is None:
            return chosen
        places = torch.zeros_like(step.history_pages.flatten())  # of every page of the pool
        places[step.history_pages.flatten()] = numbering.history_pages.flatten()
        per_page = PAGE_TOKENS // self.kind.ratio
        entries = (chosen.long() - step.num_window_rows).clamp_min(0)
        slots = places[entries // per_page] * per_page + entries % per_page
        return torch.where(chosen >= 0, numbering.num_window_rows + slots, -1).int()

    def bytes_needed(self) -> int:
        """Bytes of one layer's attention: queries and results once, every listed row once per query in decode and once per
        request in prefill, whose queries share rows."""
        positions = self.plan.step.positions
        listed = int(self.kind.lengths(positions).sum())
        if self.case.num_tokens > len(self.case.starts):
            ends = torch.tensor(self.lengths.seq_lens)
            window = (ends.clamp_max(128) + torch.tensor(self.lengths.extend_lens) - 1).sum()
            listed = int(window + (ends // self.kind.ratio if self.kind.ratio else 0 * ends).sum())
        return listed * self.cache.spec.rows.row_bytes + 4 * self.q[0].numel()

    def _window_table(self, pages: int, device: torch.device, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        ranges = [
            (max(0, start - 127) // PAGE_TOKENS, (start + count - 1) // PAGE_TOKENS)
            for start, count in zip(self.case.starts, self.case.extends, strict=True)
        ]
        total = sum(last - first + 1 for first, last in ranges)
        order = torch.randperm(total, device=device, generator=generator)
        table = torch.full((len(ranges), pages), _UNREACHED, dtype=torch.int64, device=device)
        at = 0
        for row, (first, last) in enumerate(ranges):
            table[row, first : last + 1] = order[at : at + last - first + 1]
            at += last - first + 1
        return table, total

    def _choose(self, generator: torch.Generator) -> torch.Tensor:
        """Random visible entries of each query, ascending: ``[T, topk]`` int32 pool rows, -1 behind."""
        step, topk = self.plan.step, self.case.topk
        parts = []
        for begin in range(0, self.case.num_tokens, 1024):
            part = slice(begin, begin + 1024)
            visible = (step.positions[part] + 1).unsqueeze(1) // 4
            most = max(topk, self.case.longest // 4)
            scores = torch.rand(len(visible), most, device=visible.device, generator=generator)
            entries = torch.arange(most, device=visible.device)
            scores = scores.masked_fill(entries >= visible, -1.0)
            best = scores.topk(topk, dim=1)
            chosen = best.indices.masked_fill(best.values < 0, _UNREACHED).sort(1).values
            valid = chosen < visible
            slots = step.entry_slots(step.token_rows[part].unsqueeze(1), chosen.where(valid, 0), 4)
            parts.append(slots.masked_fill(~valid, -1).int())
        return torch.cat(parts)


def fill(pool: torch.Tensor, fmt: RowFormat, generator: torch.Generator) -> None:
    """Fill a pool with random rows: every row its own in bf16, a long pattern of them in a packed format."""
    if fmt is BF16_ROW:
        for begin in range(0, len(pool), 1 << 20):
            part = pool[begin : begin + (1 << 20)]
            part.copy_(torch.randn(part.shape, device=pool.device, generator=generator))
        return
    rows = torch.randn(_PATTERN_ROWS, fmt.dim, device=pool.device, generator=generator)
    shape = fmt.pool_shape(_PATTERN_ROWS)
    pattern = torch.zeros(shape, dtype=fmt.storage_dtype, device=pool.device)
    naive_store_rows(pattern, torch.arange(_PATTERN_ROWS, device=pool.device), rows, fmt)
    for begin in range(0, len(pool), shape[0]):
        part = pool[begin : begin + shape[0]]
        part.copy_(pattern[: len(part)])
