"""transformers reads every tensor of the file, unchanged, and nothing else."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from sglang_dsv4.tiny import TinySpec
from sglang_dsv4.tiny.checkpoint import WEIGHTS

SPEC = TinySpec()
# The released names, read as transformers names them. Written out here, and not taken from transformers.
RENAMED = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_(\w+)$", r"model.hc_head.hc_\1"),
    (r"^layers\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_(\w+)$", r".\1_hc.\2"),
    (r"\.attn\.indexer\.compressor\.", ".attn.compressor.indexer."),
    (r"\.attn\.indexer\.weights_proj\.", ".attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn\.indexer\.", ".attn.compressor.indexer."),
    (r"\.(compressor|indexer)\.norm\.", r".\1.kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.attn_sink$", ".sinks"),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.w3\.", ".up_proj."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
)


def renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def expected_state(written: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model must hold: the written tensors, the routed experts of a layer stacked."""
    state = {renamed(name): tensor for name, tensor in written.items() if ".experts." not in name}
    for layer_id in range(SPEC.num_layers):
        experts = [f"layers.{layer_id}.ffn.experts.{expert}." for expert in range(SPEC.num_experts)]
        prefix = f"model.layers.{layer_id}.mlp.experts."
        up = [torch.cat([written[e + "w1.weight"], written[e + "w3.weight"]]) for e in experts]
        state[prefix + "gate_up_proj"] = torch.stack(up)
        state[prefix + "down_proj"] = torch.stack([written[e + "w2.weight"] for e in experts])
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_arrives_unchanged(checkpoint: Path, dtype: torch.dtype):
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    assert type(model).__name__ == "DeepseekV4ForCausalLM"
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], kind
    state = model.state_dict()
    expected = expected_state(load_file(checkpoint / WEIGHTS))
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        # bf16 models round what is fp32 in the file and not kept in fp32 by transformers: nothing but the gate's bias.
        kept = tensor.to(state[name].dtype)
        assert torch.equal(state[name], kept), name
        assert torch.equal(kept.to(tensor.dtype), tensor) or name.endswith("e_score_correction_bias"), name


def test_layer_types_and_rope_come_out_right(checkpoint: Path):
    config = AutoConfig.from_pretrained(checkpoint)
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    assert config.layer_types == [kinds[ratio] for ratio in SPEC.compress_ratios]
    assert config.mlp_layer_types == ["hash_moe"] * SPEC.num_hash_layers + ["moe"] * (SPEC.num_layers - SPEC.num_hash_layers)
    assert config.compress_rates == {kinds[4]: 4, kinds[128]: 128}
    assert config.qk_rope_head_dim == SPEC.rope_dim
    main, compress = config.rope_parameters["main"], config.rope_parameters["compress"]
    assert (main["rope_type"], main["rope_theta"]) == ("default", 10000)
    assert (compress["rope_type"], compress["rope_theta"], compress["factor"]) == ("yarn", 160000, 16)
    assert (compress["original_max_position_embeddings"], compress["attention_factor"]) == (65536, 1.0)


def test_every_key_of_the_configuration_is_read_or_known_to_be_sglangs(checkpoint: Path):
    """A misspelt key would be ignored in silence."""
    config = AutoConfig.from_pretrained(checkpoint)
    elsewhere = {"compress_ratios", "num_hash_layers", "rope_scaling", "torch_dtype", "topk_method"}
    written = json.loads((checkpoint / "config.json").read_text())
    for name in set(written) - elsewhere:
        assert getattr(config, name) == written[name], name


def test_first_half_feeds_the_next_block(checkpoint: Path):
    """The stream that the file keeps in the first columns is b: a token moves the next entry through it, not its own."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    compressor = model.model.layers[1].self_attn.compressor
    hidden = torch.randn(1, 16, SPEC.hidden_size)
    positions = torch.arange(16).unsqueeze(0)
    latent = torch.randn(1, 16, SPEC.q_lora_rank)

    def entries() -> torch.Tensor:
        with torch.no_grad():
            return compressor(hidden, latent, positions, None, 1)[0][0, 0]  # [4, 512]

    before = entries()
    with torch.no_grad():
        compressor.kv_proj.weight[: SPEC.head_dim] += 0.1
    moved = (entries() - before).abs().amax(dim=1)
    assert moved[0] == 0.0 and (moved[1:] > 0.01).all()
