"""Feeds a cache with fixed per-token inputs, in any cut, and reads back the bytes that a query could reach."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsv4_kernels.layout import RowFormat
from dsv4_kernels.row_codec.naive import _load_grouped
from sglang_dsv4.cache import CompressedKVCache, CompressorWeights, ExternalKVCache, NormWeights, Request, StepPlan
from sglang_dsv4.cache.regions import Kind, Part
from sglang_dsv4.spec import CacheSpec

CONFIG = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0],
    "index_topk": 16,
    "sliding_window": 128,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1},
}
FORMATS = [("bf16", "bf16"), ("fp8_584", "fp8"), ("fp32", "fp32")]


def make_spec(formats: tuple[str, str] = FORMATS[0], **options) -> CacheSpec:
    """A window-only, a CSA and an HCA layer."""
    return CacheSpec.from_hf(CONFIG, row_format=formats[0], index_format=formats[1], **options)


@dataclass(frozen=True)
class WindowInput:
    """A layer's K=V projection, with the weights that go with it."""

    kv: torch.Tensor
    norm_weight: torch.Tensor
    eps: float

    @property
    def values(self) -> torch.Tensor:
        return self.kv

    @property
    def weights(self) -> NormWeights:
        return NormWeights(self.norm_weight, self.eps)


@dataclass(frozen=True)
class CompressorInput:
    """A compressor's projections, with the weights that go with them."""

    kv_score: torch.Tensor
    slot_bias: torch.Tensor
    norm_weight: torch.Tensor
    eps: float

    @property
    def values(self) -> torch.Tensor:
        return self.kv_score

    @property
    def weights(self) -> CompressorWeights:
        return CompressorWeights(self.slot_bias, self.norm_weight, self.eps)


def append(
    cache: CompressedKVCache | ExternalKVCache, layer_id: int, plan: StepPlan, **parts: WindowInput | CompressorInput
) -> None:
    """Bind the parts' weights, and append the parts."""
    layer = cache.layers[layer_id]
    layer.bind(**{part: given.weights for part, given in parts.items()})
    layer.append(plan, **{part: given.values for part, given in parts.items()})


@dataclass(frozen=True)
class TokenInputs:
    """Per-token inputs of one sequence: per layer, the input of each part over all tokens."""

    parts: tuple[dict[str, WindowInput | CompressorInput], ...]

    def cut(self, layer_id: int, part: str, begin: int, end: int) -> WindowInput | CompressorInput:
        given = self.parts[layer_id][part]
        if isinstance(given, WindowInput):
            return WindowInput(given.kv[begin:end], given.norm_weight, given.eps)
        return CompressorInput(given.kv_score[begin:end], given.slot_bias, given.norm_weight, given.eps)

    def to(self, device: str) -> "TokenInputs":
        """The same inputs on a device."""

        def moved(given):
            fields = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in vars(given).items()
            }
            return type(given)(**fields)

        return TokenInputs(tuple({part: moved(given) for part, given in layer.items()} for layer in self.parts))


def random_weights(spec: CacheSpec, seed: int = 7) -> list[dict[str, tuple]]:
    """Per layer and part: (norm weight, slot bias)."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for layer in spec.layers:
        parts = {"window": (torch.rand(512, generator=generator) + 0.5, None)}
        if layer.ratio:
            slots = 2 * layer.ratio if layer.overlap else layer.ratio
            parts["main"] = (torch.rand(512, generator=generator) + 0.5, torch.randn(slots, 512, generator=generator))
        if layer.indexed:
            parts["index"] = (torch.rand(128, generator=generator) + 0.5, torch.randn(8, 128, generator=generator))
        weights.append(parts)
    return weights


def random_sequence(spec: CacheSpec, num_tokens: int, seed: int = 0) -> TokenInputs:
    """Inputs with gates far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer, weights in zip(spec.layers, random_weights(spec), strict=True):
        parts = {}
        for part, (norm_weight, slot_bias) in weights.items():
            dim = len(norm_weight)
            if part == "window":
                kv = torch.randn(num_tokens, dim, generator=generator)
                parts[part] = WindowInput(kv, norm_weight, 1e-6)
            else:
                width = (4 if layer.overlap else 2) * dim
                kv_score = 2 * torch.randn(num_tokens, width, generator=generator)
                parts[part] = CompressorInput(kv_score, slot_bias, norm_weight, 1e-6)
        layers.append(parts)
    return TokenInputs(tuple(layers))


def _joined(given: Sequence[WindowInput | CompressorInput]) -> WindowInput | CompressorInput:
    first = given[0]
    if isinstance(first, WindowInput):
        return WindowInput(torch.cat([part.kv for part in given]), first.norm_weight, first.eps)
    kv_score = torch.cat([part.kv_score for part in given])
    return CompressorInput(kv_score, first.slot_bias, first.norm_weight, first.eps)


def append_all(cache: CompressedKVCache, plan: StepPlan, cuts: Sequence[tuple[TokenInputs, int, int]]) -> None:
    """Append every part of every layer; ``cuts`` are (sequence, begin, end) in the plan's order."""
    for layer_id, layer in enumerate(cache.layers):
        names = [part.value for part in layer.parts]
        parts = {name: _joined([sequence.cut(layer_id, name, begin, end) for sequence, begin, end in cuts]) for name in names}
        append(cache, layer_id, plan, **parts)


def feed(cache: CompressedKVCache, items: Sequence[tuple[Request, TokenInputs, int]]) -> StepPlan:
    """One step: each request gets its sequence's next tokens."""
    plan = cache.plan([(request, count) for request, _, count in items])
    cuts = [(sequence, request.seq_len, request.seq_len + count) for request, sequence, count in items]
    append_all(cache, plan, cuts)
    cache.commit(plan)
    return plan


def raw_rows(pool: torch.Tensor, slots: torch.Tensor, fmt: RowFormat) -> bytes:
    """The stored bytes of some rows."""
    slots = slots.to(pool.device)
    if fmt.group_rows == 1:
        return pool[slots].contiguous().view(torch.uint8).cpu().numpy().tobytes()
    data, scales = _load_grouped(pool, slots, fmt)
    return data.cpu().numpy().tobytes() + scales.cpu().numpy().tobytes()


def reachable_bytes(cache: CompressedKVCache, request: Request) -> dict[tuple[int, str], bytes]:
    """Entries, index keys and window rows of a request, per layer and kind."""
    history = torch.tensor(request.pages.history, dtype=torch.int64)
    window = torch.tensor(request.pages.window, dtype=torch.int64)
    return table_bytes(cache, request.seq_len, history, window)


def table_bytes(
    cache: CompressedKVCache, seq_len: int, history: torch.Tensor, window: torch.Tensor
) -> dict[tuple[int, str], bytes]:
    """As `reachable_bytes`, from page tables."""
    spec, found = cache.spec, {}
    page_tokens = spec.page_tokens
    positions = torch.arange(max(0, seq_len - spec.window + 1), seq_len)
    window_rows = window[positions // page_tokens] * page_tokens + positions % page_tokens
    for layer in cache.layers:
        storage, layer_id, ratio = layer.memory.storage, layer.layer_id, layer.ratio
        found[layer_id, "window"] = raw_rows(storage.pool, window_rows, spec.rows)
        if ratio:
            entries = torch.arange(seq_len // ratio)
            per_page = page_tokens // ratio
            rows = history[entries // per_page] * per_page + entries % per_page
            found[layer_id, "entries"] = raw_rows(storage.pool, cache.storage.num_window_rows + rows, spec.rows)
            keys = storage.tensor(Kind.INDEX_KEY, Part.INDEX)
            if keys is not None:
                found[layer_id, "index keys"] = raw_rows(keys, rows, spec.index_keys)
    return found
