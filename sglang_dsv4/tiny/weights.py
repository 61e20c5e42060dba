"""Seeded weights, in the released checkpoint's names and dtypes.

The scales are chosen so that a wrong cache changes the logits: without care, a random model's attention is either flat
(every entry alike) or all sink, and its residual streams drown it.

* The gates' logits have a standard deviation of about 2, so the softmax of a block is far from uniform.
* Key norms (`Scales`) are above 1, so that attention is selective, or, for comparisons in bf16, just below; HCA entries, of
  which there are few, have the largest.
* Sinks take a visible share, and never most of it.
* Attention's output is as large as the residual stream that it is added to.

How it was checked: ``tests/tiny/test_sensitivity.py`` runs transformers on the checkpoint and takes away, one at a
time, the CSA entries, the HCA entries, the window, the indexer's choice, the sinks and one block's b-stream, and
requires each to move the final logits by a stated fraction of their own spread; and ``tests/tiny/test_calm.py`` holds what
rounding does to a calm checkpoint against what a wrong page does.
"""

import math
from collections.abc import Iterator

import torch

from sglang_dsv4.spec import CSA_RATIO
from sglang_dsv4.tiny.scales import SCALES
from sglang_dsv4.tiny.spec import WINDOW_ONLY_RATIO, TinySpec
from sglang_dsv4.tiny.tokenizer import byte_id

EMBED_STD = 1.0
GATE_STD = 2.0
APE_STD = 1.0
SINK_MEAN, SINK_STD = 4.0, 1.0
SHARED_EXPERT_GAIN = 0.5
HC_SCALE = 0.5
LOGIT_STD = 2.5
UNPRINTABLE_STD = 0.8
# How much the head dislikes the token just read, in units of its embedding: greedy text does not get stuck on one token.
REPEAT_AVERSION = 0.5

NamedTensor = tuple[str, torch.Tensor]


class _Source:
    """One seeded stream of random tensors."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(*shape, generator=self._generator)

    def linear(self, rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        """``[rows, columns]`` bf16: unit-variance inputs give outputs of standard deviation ``gain``."""
        return self.normal(rows, columns, std=gain / math.sqrt(columns)).bfloat16()

    def norm(self, width: int, mean: float = 1.0) -> torch.Tensor:
        """``[width]`` bf16, around ``mean``, never near 0."""
        spread = torch.rand(width, generator=self._generator) - 0.5
        return (mean * (1.0 + 0.5 * spread)).bfloat16()

    def choices(self, rows: int, count: int, below: int) -> torch.Tensor:
        """``[rows, count]`` int64: distinct numbers under ``below`` in every row."""
        return torch.rand(rows, below, generator=self._generator).argsort(dim=1)[:, :count].contiguous()


def draw_weights(spec: TinySpec) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by name, on the CPU; the same for equal specs."""
    source = _Source(spec.seed)
    tensors = dict(_model_ends(source, spec))
    for layer_id, ratio in enumerate(spec.compress_ratios):
        prefix = f"layers.{layer_id}."
        parts = (
            *_hyper_connections(source, spec),
            *_attention(source, spec, ratio),
            *_experts(source, spec, hashed=layer_id < spec.num_hash_layers),
        )
        tensors |= {prefix + name: tensor for name, tensor in parts}
    return tensors


def _model_ends(source: _Source, spec: TinySpec) -> Iterator[NamedTensor]:
    """Embedding, final norm and head. Characters a terminal can show are the likeliest tokens."""
    embed = source.normal(spec.vocab_size, spec.hidden_size, std=EMBED_STD)
    head = source.normal(spec.vocab_size, spec.hidden_size, std=1.0) - REPEAT_AVERSION * embed
    scale = torch.full((spec.vocab_size, 1), UNPRINTABLE_STD)
    scale[byte_id(0x20) : byte_id(0x7F)] = LOGIT_STD
    yield "embed.weight", embed.bfloat16()
    yield "head.weight", (scale * head / math.sqrt(spec.hidden_size)).bfloat16()
    yield "norm.weight", source.norm(spec.hidden_size)
    width = spec.hc_mult * spec.hidden_size
    yield "hc_head_fn", source.normal(spec.hc_mult, width, std=width**-0.5)
    yield "hc_head_base", source.normal(spec.hc_mult, std=1.0)
    yield "hc_head_scale", torch.full((1,), HC_SCALE)


def _hyper_connections(source: _Source, spec: TinySpec) -> Iterator[NamedTensor]:
    """fp32, as in the released checkpoints: rows are collapse, placement, and mixing of the residual streams."""
    rows, width = (2 + spec.hc_mult) * spec.hc_mult, spec.hc_mult * spec.hidden_size
    for site in ("attn", "ffn"):
        yield f"hc_{site}_fn", source.normal(rows, width, std=width**-0.5)
        yield f"hc_{site}_base", source.normal(rows, std=1.0)
        yield f"hc_{site}_scale", torch.full((3,), HC_SCALE)


def _attention(source: _Source, spec: TinySpec, ratio: int) -> Iterator[NamedTensor]:
    hidden, heads, scales = spec.hidden_size, spec.num_heads, SCALES[spec.scales]
    yield "attn_norm.weight", source.norm(hidden)
    yield "attn.wq_a.weight", source.linear(spec.q_lora_rank, hidden)
    yield "attn.q_norm.weight", source.norm(spec.q_lora_rank)
    yield "attn.wq_b.weight", source.linear(heads * spec.head_dim, spec.q_lora_rank)
    yield "attn.wkv.weight", source.linear(spec.head_dim, hidden)
    yield "attn.kv_norm.weight", source.norm(spec.head_dim, scales.window_key_norm)
    group_width = heads * spec.head_dim // spec.o_groups
    yield ("attn.wo_a.weight", source.linear(spec.o_groups * spec.o_lora_rank, group_width, scales.attention_gain))
    yield "attn.wo_b.weight", source.linear(hidden, spec.o_groups * spec.o_lora_rank)
    yield "attn.attn_sink", source.normal(heads, std=SINK_STD, mean=SINK_MEAN)
    if ratio == WINDOW_ONLY_RATIO:
        return
    key_norm = scales.csa_key_norm if ratio == CSA_RATIO else scales.hca_key_norm
    yield from _compressor(source, "attn.compressor.", hidden, spec.head_dim, ratio, key_norm)
    if ratio == CSA_RATIO:
        yield ("attn.indexer.wq_b.weight", source.linear(spec.index_n_heads * spec.index_dim, spec.q_lora_rank))
        yield "attn.indexer.weights_proj.weight", source.linear(spec.index_n_heads, hidden)
        yield from _compressor(source, "attn.indexer.compressor.", hidden, spec.index_dim, ratio, key_norm)


def _compressor(source: _Source, prefix: str, hidden: int, dim: int, ratio: int, key_norm: float) -> Iterator[NamedTensor]:
    """CSA has two streams side by side: columns ``[:dim]`` feed the next block's entry, ``[dim:]`` the own block's."""
    width = 2 * dim if ratio == CSA_RATIO else dim
    yield prefix + "wkv.weight", source.linear(width, hidden)
    yield prefix + "wgate.weight", source.linear(width, hidden, GATE_STD)
    yield prefix + "ape", source.normal(ratio, width, std=APE_STD)
    yield prefix + "norm.weight", source.norm(dim, key_norm)


def _experts(source: _Source, spec: TinySpec, *, hashed: bool) -> Iterator[NamedTensor]:
    hidden, width = spec.hidden_size, spec.moe_width
    yield "ffn_norm.weight", source.norm(hidden)
    yield "ffn.gate.weight", source.linear(spec.num_experts, hidden, 2.0)
    if hashed:
        yield ("ffn.gate.tid2eid", source.choices(spec.vocab_size, spec.experts_per_token, spec.num_experts))
    else:
        yield "ffn.gate.bias", source.normal(spec.num_experts, std=0.1)
    routed_gain = SCALES[spec.scales].routed_expert_gain
    gains = {f"ffn.experts.{expert}.": routed_gain for expert in range(spec.num_experts)}
    gains["ffn.shared_experts."] = SHARED_EXPERT_GAIN
    for name, gain in gains.items():
        yield name + "w1.weight", source.linear(width, hidden)
        yield name + "w2.weight", source.linear(hidden, width, gain)
        yield name + "w3.weight", source.linear(width, hidden)
