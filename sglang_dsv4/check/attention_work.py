"""A cache of layers of one kind over random rows, and one step over it: what attention is checked and timed with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_kernels.layout import BF16_ROW, RowFormat
from dsv4_kernels.row_codec import naive_load_rows, naive_store_rows
from dsv4_kernels.row_lists import ListKind
from dsv4_kernels.step import StepTensors
from sglang_dsv4.attention.host_lengths import HostLengths
from sglang_dsv4.attention.row_list_kinds import kind_of
from sglang_dsv4.cache import Capacity, ExternalKVCache
from sglang_dsv4.spec import CacheSpec

PAGE_TOKENS = 256
RATIOS = {"window": 0, "csa": 4, "hca": 128}
SCALE = 512**-0.5
YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
_UNREACHED = 1 << 40
_PATTERN_ROWS = 8192


def v4_config(ratios: Sequence[int], topk: int = 512) -> dict[str, Any]:
    """A configuration with DeepSeek-V4's geometry and layers of these compression ratios."""
    return {
        "model_type": "deepseek_v4",
        "num_hidden_layers": len(ratios),
        "compress_ratios": [*ratios],
        "index_topk": topk,
        "sliding_window": 128,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "index_head_dim": 128,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": YARN,
    }


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
    """Layers that differ in their rows, queries and choices, so that attending one after another finds nothing in the L2 cache.

    Args:
        case (AttentionCase): the step.
        num_layers (int): how many layers.
        row_format (str): of the rows.
        device (torch.device): where.
        seed (int): of all random numbers.

    Attributes:
        cache (ExternalKVCache): the layers; every row holds random numbers.
        kind (ListKind): which rows a query of such a layer lists.
        plan (StepPlan): the step; ``lengths`` are its lengths on the host.
        q (list[torch.Tensor]): queries by layer, ``[T, H, 512]`` bf16.
        sink (torch.Tensor): ``[H]``.
        selected (list[torch.Tensor | None]): chosen pool rows by layer, ``[T, topk]`` int32, -1 behind them; None where a layer
            chooses none.
    """

    def __init__(self, case: AttentionCase, num_layers: int, row_format: str, device: torch.device, seed: int = 0) -> None:
        self.case = case
        self._random = {"device": device, "generator": torch.Generator(device=device).manual_seed(seed)}
        batch, pages = len(case.starts), -(-case.longest // PAGE_TOKENS)
        window_pages, window_count = self._window_table(pages)
        config = v4_config([RATIOS[case.kind]] * num_layers, case.topk)
        spec = CacheSpec.from_hf(config, row_format=row_format, page_tokens=PAGE_TOKENS)
        self.cache = ExternalKVCache(spec, Capacity(batch * pages, window_count, 1, pages * PAGE_TOKENS), device)
        self.kind: ListKind = kind_of(spec, spec.layers[0])
        for layer in self.cache.layers:
            fill(layer.pool, spec.rows, self._random["generator"])
        starts, extends = torch.tensor(case.starts), torch.tensor(case.extends)
        self.lengths = HostLengths((starts + extends).tolist(), extends.tolist())
        step = StepTensors(
            positions=self.lengths.positions().to(device),
            token_rows=torch.repeat_interleave(torch.arange(batch), extends).to(device),
            seq_lens=(starts + extends).to(device),
            extend_lens=extends.to(device),
            state_slots=torch.zeros(batch, dtype=torch.int64, device=device),
            history_pages=torch.randperm(batch * pages, **self._random).view(batch, pages),
            window_pages=window_pages,
            page_tokens=PAGE_TOKENS,
            num_window_rows=window_count * PAGE_TOKENS,
        )
        self.plan = self.cache.plan(step)
        shape = (case.num_tokens, case.heads, 512)
        self.q = [torch.randn(shape, **self._random).bfloat16() for _ in range(num_layers)]
        self.sink = torch.randn(case.heads, **self._random)
        self.selected = [self._choose() if case.kind == "csa" else None for _ in range(num_layers)]

    def indices(self, layer_id: int) -> torch.Tensor:
        """Listed pool rows of every query, -1 behind them; from the references."""
        rows, ratio = self.plan.rows, self.cache.layers[layer_id].ratio
        entries = self.selected[layer_id] if self.case.kind == "csa" else rows.every_entry(ratio) if ratio else None
        return rows.window if entries is None else torch.cat([rows.window, entries.long()], 1)

    def rows(self, layer_id: int, query: int) -> torch.Tensor:
        """The listed rows of one query, fp32."""
        listed, layer = self.indices(layer_id)[query], self.cache.layers[layer_id]
        return naive_load_rows(layer.pool, listed[listed >= 0], layer.row_format)

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
        listed = int(self.kind.lengths(self.plan.step.positions).sum())
        if self.case.num_tokens > len(self.case.starts):
            ends = torch.tensor(self.lengths.seq_lens)
            window = (ends.clamp_max(128) + torch.tensor(self.lengths.extend_lens) - 1).sum()
            listed = int(window + (ends // self.kind.ratio if self.kind.ratio else 0 * ends).sum())
        return listed * self.cache.spec.rows.row_bytes + 4 * self.q[0].numel()

    def _window_table(self, pages: int) -> tuple[torch.Tensor, int]:
        """Pages of the rows that windows reach, in random order, elsewhere a page that does not exist; and their number."""
        table = torch.full((len(self.case.starts), pages), _UNREACHED, dtype=torch.int64, device=self._random["device"])
        reached = torch.zeros_like(table, dtype=torch.bool)
        for row, (start, count) in enumerate(zip(self.case.starts, self.case.extends, strict=True)):
            reached[row, max(0, start - 127) // PAGE_TOKENS : (start + count - 1) // PAGE_TOKENS + 1] = True
        total = int(reached.sum())
        table[reached] = torch.randperm(total, **self._random)
        return table, total

    def _choose(self) -> torch.Tensor:
        """Random visible entries of each query, ascending: ``[T, topk]`` int32 pool rows, -1 behind."""
        step, topk = self.plan.step, self.case.topk
        most = max(topk, self.case.longest // 4)
        parts = []
        for positions, rows in zip(step.positions.split(1024), step.token_rows.split(1024), strict=True):
            visible = (positions + 1).unsqueeze(1) // 4
            entries = torch.arange(most, device=visible.device)
            scores = torch.rand(len(visible), most, **self._random).masked_fill(entries >= visible, -1.0)
            best = scores.topk(topk, dim=1)
            chosen = best.indices.masked_fill(best.values < 0, _UNREACHED).sort(1).values
            valid = chosen < visible
            slots = step.entry_slots(rows.unsqueeze(1), chosen.where(valid, 0), 4)
            parts.append(slots.masked_fill(~valid, -1).int())
        return torch.cat(parts)


def fill(pool: torch.Tensor, fmt: RowFormat, generator: torch.Generator) -> None:
    """Fill a pool with random rows: every row its own in bf16, a long pattern of them in a packed format."""
    if fmt is BF16_ROW:
        for part in pool.split(1 << 20):
            part.copy_(torch.randn(part.shape, device=pool.device, generator=generator))
        return
    rows = torch.randn(_PATTERN_ROWS, fmt.dim, device=pool.device, generator=generator)
    pattern = torch.zeros(fmt.pool_shape(_PATTERN_ROWS), dtype=fmt.storage_dtype, device=pool.device)
    naive_store_rows(pattern, torch.arange(_PATTERN_ROWS, device=pool.device), rows, fmt)
    for part in pool.split(len(pattern)):
        part.copy_(pattern[: len(part)])
