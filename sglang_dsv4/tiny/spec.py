"""The shape of a tiny checkpoint, and its configuration files."""

from dataclasses import asdict, dataclass
from typing import Any

from sglang_dsv4.spec import CSA_RATIO, HCA_RATIO
from sglang_dsv4.tiny.scales import SCALES
from sglang_dsv4.tiny.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE

WINDOW_ONLY_RATIO = 0
_SPECIAL_IDS = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
_YARN = {"type": "yarn", "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
# Of every checkpoint, as in the released ones.
_FIXED: dict[str, Any] = {
    **{"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "torch_dtype": "bfloat16"},
    **{"attention_bias": False, "attention_dropout": 0.0, "num_key_value_heads": 1, "initializer_range": 0.02},
    **{"hidden_act": "silu", "swiglu_limit": 10.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_cache": True},
    **{"rope_theta": 10000, "compress_rope_theta": 160000, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "n_shared_experts": 1},
    **{"norm_topk_prob": True, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc"},
    "num_nextn_predict_layers": 0,
    **_SPECIAL_IDS,
}


@dataclass(frozen=True)
class TinySpec:
    """What `write_tiny_checkpoint` writes: V4-Flash's attention geometry at small widths.

    What a cache has to get right has its released size and cannot be changed: head dimension, RoPE dimension, index
    dimension, window, both RoPE bases and YaRN, sinks, the number of residual streams. The widths around it are small.

    Attributes:
        seed (int): of every random draw; equal specs give equal files.
        compress_ratios (tuple[int, ...]): tokens per entry, one per layer: 0, 4 or 128. No draft layer is written, so
            none is listed.
        index_topk (int): entries a CSA query attends to, at most.
        hidden_size (int): width of the residual streams.
        num_heads (int): query heads.
        o_groups (int): groups of the output projection; divides ``num_heads``.
        o_lora_rank (int): width of each group's latent.
        q_lora_rank (int): width of the query latent.
        index_n_heads (int): query heads of the indexer. Fewer than 16 make ties of the score 0 likely.
        num_experts (int): routed experts.
        experts_per_token (int): routed experts chosen per token.
        moe_width (int): inner width of an expert.
        num_hash_layers (int): layers, from the first, whose experts are chosen by token id.
        max_positions (int): longest sequence that the configuration allows.
        rope_factor (int): of YaRN. At 1 all layers rotate alike however a program treats window-only ones: SGLang 0.5.17
            scales them too, which the released model does not.
        scales (str): of `SCALES`: ``"sharp"`` for fp32 arithmetic, ``"calm"`` for bf16.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    seed: int = 0
    compress_ratios: tuple[int, ...] = (0, 4, 128, 4, 128)
    index_topk: int = 512
    hidden_size: int = 256
    num_heads: int = 8
    o_groups: int = 2
    o_lora_rank: int = 128
    q_lora_rank: int = 128
    index_n_heads: int = 16
    num_experts: int = 8
    experts_per_token: int = 2
    moe_width: int = 128
    num_hash_layers: int = 2
    max_positions: int = 65536
    rope_factor: int = 16
    scales: str = "sharp"

    head_dim = 512
    rope_dim = 64
    index_dim = 128
    window = 128
    hc_mult = 4
    vocab_size = VOCAB_SIZE

    def __post_init__(self) -> None:
        allowed = (WINDOW_ONLY_RATIO, CSA_RATIO, HCA_RATIO)
        if not self.compress_ratios:
            raise ValueError("compress_ratios: expected at least one layer, got none")
        for layer_id, ratio in enumerate(self.compress_ratios):
            if ratio not in allowed:
                raise ValueError(f"compress_ratios[{layer_id}]: expected one of {allowed}, got {ratio}")
        for name, value in asdict(self).items():
            if name not in ("seed", "compress_ratios", "num_hash_layers", "scales") and value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if self.num_heads % self.o_groups:
            raise ValueError(f"o_groups: expected a divisor of num_heads={self.num_heads}, got {self.o_groups}")
        if self.experts_per_token > self.num_experts:
            most = self.num_experts
            raise ValueError(f"experts_per_token: expected at most num_experts={most}, got {self.experts_per_token}")
        if self.scales not in SCALES:
            raise ValueError(f"scales: expected one of {', '.join(SCALES)}, got {self.scales}")
        if not 0 <= self.num_hash_layers <= self.num_layers:
            raise ValueError(f"num_hash_layers: expected 0 .. {self.num_layers}, got {self.num_hash_layers}")

    @property
    def num_layers(self) -> int:
        """Transformer blocks."""
        return len(self.compress_ratios)

    def config(self) -> dict[str, Any]:
        """``config.json``, with the keys of the released checkpoints.

        SGLang reads ``compress_ratios`` and ``rope_scaling`` as they stand. transformers derives ``layer_types``,
        ``mlp_layer_types`` and its nested ``rope_parameters`` from ``compress_ratios``, ``num_hash_layers`` and
        ``rope_scaling``; without the list of ratios it would assume Pro's layout.
        """
        return {
            **_FIXED,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "max_position_embeddings": self.max_positions,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "head_dim": self.head_dim,
            "qk_rope_head_dim": self.rope_dim,
            "q_lora_rank": self.q_lora_rank,
            "o_groups": self.o_groups,
            "o_lora_rank": self.o_lora_rank,
            "compress_ratios": list(self.compress_ratios),
            "sliding_window": self.window,
            "index_head_dim": self.index_dim,
            "index_n_heads": self.index_n_heads,
            "index_topk": self.index_topk,
            "rope_scaling": {**_YARN, "factor": self.rope_factor},
            "hc_mult": self.hc_mult,
            "n_routed_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "moe_intermediate_size": self.moe_width,
            "num_hash_layers": self.num_hash_layers,
        }

    def generation_config(self) -> dict[str, Any]:
        """``generation_config.json``: greedy unless a request says otherwise."""
        return {**_SPECIAL_IDS, "do_sample": False}


# By name, what `make-tiny --shape` offers. `heads64` has as many heads as GPU kernels want and little else; `flash` has
# V4-Flash's own widths in all that attention and its cache work on, a few layers, and few and narrow experts. Both are for
# GPUs, where servers compute in bf16.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "heads64": {"num_heads": 64, "o_groups": 8, "o_lora_rank": 64, "index_n_heads": 64, "scales": "calm"},
    "flash": {
        "hidden_size": 4096,
        "num_heads": 64,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "q_lora_rank": 1024,
        "index_n_heads": 64,
        "experts_per_token": 6,
        "moe_width": 512,
        "max_positions": 262144,
        "scales": "calm",
    },
}
