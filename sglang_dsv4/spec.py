"""What a cache must hold, derived once from a model's configuration."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import index
from typing import Any

from dsv4_kernels.layout import HEAD_DIM, INDEX_DIM, INDEX_FORMATS, ROPE_DIM, ROW_FORMATS, RowFormat
from dsv4_kernels.norm_rope import RopeSpec
from sglang_dsv4.errors import UnsupportedError

WINDOW_ONLY_RATIO = 0
CSA_RATIO = 4
HCA_RATIO = 128
_RATIO_OF_LAYER_TYPE = {
    "sliding_attention": WINDOW_ONLY_RATIO,
    "compressed_sparse_attention": CSA_RATIO,
    "heavily_compressed_attention": HCA_RATIO,
}
# What index keys are stored as where only the row format was chosen.
INDEX_FORMAT_OF_ROWS = {"bf16": "bf16", "fp8_584": "fp8", "fp32": "fp32"}
_MIN_PAGE_TOKENS = 128
_FP32_BYTES = 4


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer.

    Attributes:
        layer_id (int): index in the model.
        ratio (int): tokens per entry; 0 for a window-only layer.
        overlap (bool): a block is pooled together with the previous block's b-stream (CSA).
        indexed (bool): the layer has index keys, and attends to the entries chosen by them.
        rope (RopeSpec): the layer's one rotary embedding, for queries, window rows, entries and index keys.
    """

    layer_id: int
    ratio: int
    overlap: bool
    indexed: bool
    rope: RopeSpec

    @property
    def kind(self) -> str:
        """``"window"``, ``"csa"`` or ``"hca"``."""
        if self.ratio == WINDOW_ONLY_RATIO:
            return "window"
        return "csa" if self.overlap else "hca"


@dataclass(frozen=True)
class CacheSpec:
    """Everything that decides the bytes of a cache.

    Attributes:
        layers (tuple[LayerSpec, ...]): in model order.
        index_topk (int): entries a CSA query attends to, at most.
        window (int): raw rows a query attends to, its own included.
        page_tokens (int): tokens per page; a multiple of 128, so that no block of any ratio crosses a page.
        row_format (str): ``"bf16"``, ``"fp8_584"`` or ``"fp32"`` (exact, for debugging); window rows and entries.
        index_format (str): ``"bf16"``, ``"fp8"`` or ``"fp32"``; index keys.
        max_draft_tokens (int): tokens by which a request may be rolled back; as many more stream rows are kept.
        head_dim (int): values per row.
        rope_dim (int): rotated channels of a row.
        index_dim (int): values per index key.

    Raises:
        UnsupportedError: a ratio, dimension or format that this package does not implement.
        ValueError: a value out of range.
    """

    layers: tuple[LayerSpec, ...]
    index_topk: int
    window: int = 128
    page_tokens: int = 256
    row_format: str = "bf16"
    index_format: str = "bf16"
    max_draft_tokens: int = 0
    head_dim: int = HEAD_DIM
    rope_dim: int = ROPE_DIM
    index_dim: int = INDEX_DIM

    def __post_init__(self) -> None:
        for name in ("index_topk", "window", "page_tokens", "max_draft_tokens"):
            _whole(name, getattr(self, name))
        for name, got, want in (
            ("head_dim", self.head_dim, HEAD_DIM),
            ("rope_dim", self.rope_dim, ROPE_DIM),
            ("index_dim", self.index_dim, INDEX_DIM),
        ):
            if got != want:
                raise UnsupportedError(f"{name}: expected {want}, the geometry of DeepSeek-V4, got {got}")
        for name, value, known in (
            ("row_format", self.row_format, ROW_FORMATS),
            ("index_format", self.index_format, INDEX_FORMATS),
        ):
            if value not in known:
                raise UnsupportedError(f"{name}: expected one of {sorted(known)}, got {value!r}")
        if self.page_tokens <= 0 or self.page_tokens % _MIN_PAGE_TOKENS:
            raise ValueError(f"page_tokens: expected a multiple of {_MIN_PAGE_TOKENS}, got {self.page_tokens}")
        if not 0 < self.window <= self.page_tokens:
            raise ValueError(f"window: expected 1 .. page_tokens={self.page_tokens}, got {self.window}")
        if not self.layers:
            raise ValueError("layers: expected at least one layer, got none")
        if self.index_topk <= 0:
            raise ValueError(f"index_topk: expected a positive number, got {self.index_topk}")
        if self.max_draft_tokens < 0:
            raise ValueError(f"max_draft_tokens: expected 0 or more, got {self.max_draft_tokens}")

    @classmethod
    def from_hf(cls, config: Any, *, num_layers: int | None = None, **options: Any) -> "CacheSpec":
        """Read a model's configuration.

        Args:
            config (Any): a ``config.json`` as a mapping, or a configuration object of transformers or SGLang.
            num_layers (int | None): layers to take; the draft layers that ``compress_ratios`` lists after the model's
                own are left out by default.
            **options (Any): fields of `CacheSpec` that a model does not decide: ``page_tokens``, ``row_format``,
                ``index_format``, ``max_draft_tokens``.

        Raises:
            UnsupportedError: not a DeepSeek-V4 configuration, or a variant that is not implemented (V4.1).
        """
        reader = _ConfigReader(config)
        count = reader.whole("num_hidden_layers", least=1) if num_layers is None else _whole("num_layers", num_layers, least=1)
        ratios = reader.ratios(count)
        window_rope, compress_rope = reader.ropes()
        layers = tuple(
            LayerSpec(
                layer_id=layer_id,
                ratio=ratio,
                overlap=ratio == CSA_RATIO,
                indexed=ratio == CSA_RATIO,
                rope=window_rope if ratio == WINDOW_ONLY_RATIO else compress_rope,
            )
            for layer_id, ratio in enumerate(ratios)
        )
        return cls(
            layers=layers,
            index_topk=reader.whole("index_topk"),
            window=reader.whole("sliding_window", 128),
            head_dim=reader.whole("head_dim"),
            rope_dim=reader.rope_dim(),
            index_dim=reader.whole("index_head_dim"),
            **options,
        )

    @property
    def rows(self) -> RowFormat:
        """Format of window rows and entries."""
        return ROW_FORMATS[self.row_format]

    @property
    def index_keys(self) -> RowFormat:
        """Format of index keys."""
        return INDEX_FORMATS[self.index_format]

    def digest(self) -> str:
        """Hash of every field; equal for two specs exactly when their caches are interchangeable."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _whole(name: str, value: Any, least: int | None = None) -> int:
    """An integer of any type, numpy's among them; neither a float nor a bool."""
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        expected = "an integer" if least is None else f"an integer of {least} or more"
        raise UnsupportedError(f"{name}: expected {expected}, got {value!r}")
    return number


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UnsupportedError(f"{name}: expected a finite number above 0, got {value!r}")
    return float(value)


def _listed(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UnsupportedError(f"{name}: expected a list, got {value!r}")
    return value


class _ConfigReader:
    """One way to read a mapping, a transformers configuration and an SGLang configuration."""

    def __init__(self, config: Any) -> None:
        self._config = config
        model_type = self.get("model_type", None)
        if model_type is not None and not str(model_type).startswith("deepseek_v4"):
            raise UnsupportedError(f"model_type: expected a DeepSeek-V4 configuration, got {model_type!r}")

    def get(self, name: str, default: Any) -> Any:
        config = self._config
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        return default if value is None else value

    def require(self, name: str) -> Any:
        value = self.get(name, None)
        if value is None:
            raise UnsupportedError(f"config.{name}: expected by DeepSeek-V4, but the configuration has none")
        return value

    def whole(self, name: str, default: int | None = None, least: int | None = None) -> int:
        """An integer; required where there is no default."""
        value = self.require(name) if default is None else self.get(name, default)
        return _whole(f"config.{name}", value, least)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """A nested part of the configuration; empty where there is none."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise UnsupportedError(f"config.{name}: expected a mapping, got {value!r}")
        return value

    def ratios(self, count: int) -> tuple[int, ...]:
        listed = self.get("compress_ratios", None)
        listed = self._ratios_of_layer_types() if listed is None else _listed("compress_ratios", listed)
        if len(listed) < count:
            raise UnsupportedError(f"compress_ratios: expected at least {count} layers, got {len(listed)}")
        ratios = tuple(_whole(f"compress_ratios[{layer_id}]", ratio) for layer_id, ratio in enumerate(listed[:count]))
        for layer_id, ratio in enumerate(ratios):
            if ratio in (1, 2):
                raise UnsupportedError(
                    f"compress_ratios[{layer_id}] is {ratio}: ratios 1 and 2 belong to DeepSeek-V4.1, which is not "
                    "implemented; this package serves DeepSeek-V4 (ratios 0, 4 and 128)"
                )
            if ratio not in (WINDOW_ONLY_RATIO, CSA_RATIO, HCA_RATIO):
                raise UnsupportedError(f"compress_ratios[{layer_id}]: expected 0, 4 or 128, got {ratio}")
        return ratios

    def _ratios_of_layer_types(self) -> list[Any]:
        layer_types = _listed("layer_types", self.require("layer_types"))
        unknown = [kind for kind in layer_types if not isinstance(kind, str) or kind not in _RATIO_OF_LAYER_TYPE]
        if unknown:
            raise UnsupportedError(f"layer_types: expected {sorted(_RATIO_OF_LAYER_TYPE)}, got {unknown}")
        rates = self.mapping("compress_rates")
        return [rates.get(kind, _RATIO_OF_LAYER_TYPE[kind]) for kind in layer_types]

    def rope_dim(self) -> int:
        if self.get("qk_rope_head_dim", None) is not None:
            return self.whole("qk_rope_head_dim")
        share = _positive("config.partial_rotary_factor", self.require("partial_rotary_factor"))
        return round(self.whole("head_dim") * share)

    def ropes(self) -> tuple[RopeSpec, RopeSpec]:
        """RoPE of window-only layers (never scaled), and of compressing layers (YaRN)."""
        dim = self.rope_dim()
        # Transformers nests {"main": {..}, "compress": {..}}; SGLang's configuration is flat; a checkpoint has neither.
        parameters = self.mapping("rope_parameters")
        main, compress = parameters.get("main", parameters), parameters.get("compress", parameters)
        for name, part in (("main", main), ("compress", compress)):
            if not isinstance(part, Mapping):
                raise UnsupportedError(f"config.rope_parameters.{name}: expected a mapping, got {part!r}")
        scaling = compress or self.mapping("rope_scaling")
        scaled = RopeSpec(
            theta=_positive("config.compress_rope_theta", self.require("compress_rope_theta")),
            dim=dim,
            factor=_positive("rope scaling's factor", scaling.get("factor", 1.0)),
            original_positions=_whole(
                "rope scaling's original_max_position_embeddings", scaling.get("original_max_position_embeddings", 0)
            ),
            beta_fast=_positive("rope scaling's beta_fast", scaling.get("beta_fast", 32)),
            beta_slow=_positive("rope scaling's beta_slow", scaling.get("beta_slow", 1)),
        )
        window_theta = main.get("rope_theta") or self.require("rope_theta")
        return RopeSpec(theta=_positive("config.rope_theta", window_theta), dim=dim), scaled
