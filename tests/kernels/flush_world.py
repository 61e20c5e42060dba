"""A batch of sequences whose tokens can be stored in any schedule, by the references or by the kernels of one part of a layer."""

from dataclasses import dataclass, field

import torch

from dsv4_kernels.compressor import CompressorParams
from dsv4_kernels.flush_csa import CsaFlush, naive_flush_csa
from dsv4_kernels.flush_csa.fused import flush_csa, flush_csa_layer
from dsv4_kernels.flush_hca import naive_flush_hca
from dsv4_kernels.flush_hca.fused import flush_hca, hca_workspace
from dsv4_kernels.layout import BF16_INDEX, BF16_ROW, FP8_584_ROW, FP8_INDEX, FP32_INDEX, FP32_ROW, INDEX_DIM
from dsv4_kernels.norm_rope import RopeSpec, rope_table
from dsv4_kernels.step import StepTensors
from dsv4_kernels.window_store import naive_window_store
from dsv4_kernels.window_store.fused import window_store

CSA_RATIO, HCA_RATIO, DIM, EPS = 4, 128, 512, 1e-6
# Inputs of each part of a layer, and their widths.
PARTS = {"window": {"window": DIM}, "csa": {"main": 4 * DIM, "index": 4 * INDEX_DIM}, "hca": {"hca": 2 * DIM}}
FORMATS = {"fp32": (FP32_ROW, FP32_INDEX), "bf16": (BF16_ROW, BF16_INDEX), "fp8": (FP8_584_ROW, FP8_INDEX)}


def nan_pool(fmt, num_rows, device):
    """A pool of 0xFF bytes: NaN in every format."""
    groups, elements = fmt.pool_shape(num_rows)
    raw = torch.full((groups, elements * fmt.storage_dtype.itemsize), 0xFF, dtype=torch.uint8, device=device)
    return raw.view(fmt.storage_dtype)


@dataclass
class World:
    """Inputs of every token of every sequence, and how they are laid out in pages.

    ``part`` is what is stored: window rows, the entries and index keys of a CSA layer, or the entries of an HCA layer.
    """

    part: str
    lengths: list[int]
    formats: str = "fp32"
    input_dtype: torch.dtype = torch.float32
    page_tokens: int = 128
    draft: int = 0
    spread: float = 2.0
    seed: int = 0
    device: str = "cpu"
    inputs: dict = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape, scale=1.0):
            return (scale * torch.randn(*shape, generator=generator)).to(self.input_dtype).to(self.device)

        self.inputs = {
            name: [normal(length, width, scale=self.spread) for length in self.lengths]
            for name, width in PARTS[self.part].items()
        }
        count = len(self.lengths)
        self.pages_each = -(-max(self.lengths) // self.page_tokens)
        self.num_pages = count * self.pages_each + 3
        shuffled = [torch.randperm(self.num_pages, generator=generator) for _ in range(2)]
        self.history, self.window = (order[: count * self.pages_each].view(count, -1).to(self.device) for order in shuffled)
        self.slots = torch.randperm(count + 2, generator=generator)[:count].to(self.device)
        self.table = rope_table(RopeSpec(160000.0, 64), max(self.lengths) + 1, self.device)
        weights = {name: 1 + 0.1 * normal(dim).float() for name, dim in (("main", DIM), ("index", INDEX_DIM))}
        bias = {
            "main": normal(2 * CSA_RATIO, DIM).float(),
            "index": normal(2 * CSA_RATIO, INDEX_DIM).float(),
            "hca": normal(HCA_RATIO, DIM).float(),
        }
        weights["hca"] = weights["main"]
        self.params = {
            name: CompressorParams(bias[name], weights[name], EPS, self.table, rotate=name == "index") for name in bias
        }

    def fresh_state(self):
        """Pools and states before the first token; nothing in them may be read."""
        rows, keys = FORMATS[self.formats]
        window_rows = self.num_pages * self.page_tokens
        slots = len(self.lengths) + 2

        def nan(*shape):
            return torch.full(shape, float("nan"), device=self.device)

        if self.part == "window":
            return {"pool": nan_pool(rows, window_rows, self.device)}
        ratio = CSA_RATIO if self.part == "csa" else HCA_RATIO
        state = {"pool": nan_pool(rows, window_rows + window_rows // ratio, self.device)}
        if self.part == "hca":
            return state | {"accumulators": nan(slots, 1 + self.draft, 3, DIM)}
        return state | {
            "index_pool": nan_pool(keys, window_rows // ratio, self.device),
            "main_streams": nan(slots, 8 + self.draft, 4 * DIM),
            "index_streams": nan(slots, 8 + self.draft, 4 * INDEX_DIM),
            "main_boundary": nan(self.num_pages, ratio, 2, DIM),
            "index_boundary": nan(self.num_pages, ratio, 2, INDEX_DIM),
        }

    def step(self, items, *, pad_tokens=0, pad_requests=0):
        """StepTensors and the inputs' rows of a step ``[(sequence, start, count)]``."""
        rows = [row for row, (_, _, count) in enumerate(items) for _ in range(count)]
        positions = [start + i for _, start, count in items for i in range(count)]
        sequences = [sequence for sequence, _, _ in items]

        def tensor(values):
            return torch.tensor(values, dtype=torch.int64, device=self.device)

        def table(pages):
            chosen = pages[sequences]
            return torch.cat([chosen, chosen.new_full((pad_requests, chosen.shape[1]), 1 << 40)])

        step = StepTensors(
            positions=tensor(positions + [-1] * pad_tokens),
            token_rows=tensor(rows + [0] * pad_tokens),
            seq_lens=tensor([start + count for _, start, count in items] + [7] * pad_requests),
            extend_lens=tensor([count for _, _, count in items] + [0] * pad_requests),
            state_slots=torch.cat([self.slots[sequences], self.slots.new_full((pad_requests,), 1 << 40)]),
            history_pages=table(self.history),
            window_pages=table(self.window),
            page_tokens=self.page_tokens,
            num_window_rows=self.num_pages * self.page_tokens,
        )
        given = {
            name: torch.cat(
                [values[s][start : start + count] for s, start, count in items]
                + [torch.full((pad_tokens, values[0].shape[1]), float("nan"), device=self.device, dtype=values[0].dtype)]
            )
            for name, values in self.inputs.items()
        }
        return step, given

    def _compressors(self, state, given):
        rows, keys = FORMATS[self.formats]
        return [
            CsaFlush(given[name], state[f"{name}_streams"], state[f"{name}_boundary"], state[pool], fmt, self.params[name])
            for name, pool, fmt in (("main", "pool", rows), ("index", "index_pool", keys))
        ]

    def _window(self, state, given):
        return given["window"], self.params["main"].norm_weight, EPS, self.table, state["pool"], FORMATS[self.formats][0]

    def _hca(self, state, given):
        return given["hca"], state["accumulators"], state["pool"], FORMATS[self.formats][0], self.params["hca"]

    def run_naive(self, state, step, given):
        """One step by the reference."""
        if self.part == "window":
            naive_window_store(step, *self._window(state, given))
        elif self.part == "hca":
            naive_flush_hca(step, *self._hca(state, given))
        else:
            for part in self._compressors(state, given):
                naive_flush_csa(step, part.kv_score, part.streams, part.boundary, part.pool, part.pool_format, part.params)

    def run_fused(self, state, step, given, *, together=True, tuning=None):
        """One step by the kernel: a CSA layer in one launch or in two, an HCA layer with a workspace or without."""
        if self.part == "window":
            window_store(step, *self._window(state, given))
        elif self.part == "hca":
            work = hca_workspace(len(step.seq_lens), len(step.positions), self.device) if together else None
            flush_hca(step, *self._hca(state, given), work, tuning)
        elif together:
            flush_csa_layer(step, *self._compressors(state, given), tuning)
        else:
            for part in self._compressors(state, given):
                flush_csa(step, part.kv_score, part.streams, part.boundary, part.pool, part.pool_format, part.params, tuning)


def random_schedule(lengths, rng, most):
    """Steps that take every sequence from 0 to its length, each sequence cut at random points."""
    done, steps = [0] * len(lengths), []
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        items = []
        for sequence in rng.sample(range(len(lengths)), rng.randint(1, len(lengths))):
            count = min(lengths[sequence] - done[sequence], rng.choice([0, 1, 1, 2, 3, rng.randint(1, most)]))
            items.append((sequence, done[sequence], count))
            done[sequence] += count
        if sum(count for _, _, count in items):
            steps.append(items)
    return steps


def one_step(lengths):
    """Every sequence at once."""
    return [[(sequence, 0, length) for sequence, length in enumerate(lengths)]]
