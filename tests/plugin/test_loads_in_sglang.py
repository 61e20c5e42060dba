"""SGLang reads every tensor of a tiny checkpoint, unchanged, and nothing else; here with stand-ins for compiled packages."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sglang_dsv4.tiny import TinySpec
from sglang_dsv4.tiny.checkpoint import WEIGHTS
from tests.plugin.warm import COPIES, Program

SPEC = TinySpec()
# Loads a checkpoint with SGLang's own loader, without a server, and saves what the model holds. In a process of its own,
# since SGLang's settings and process groups are global.
LOAD = """
import inspect, json, logging, sys
import torch
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
checkpoint, out = sys.argv[1:]
args = ServerArgs(model_path=checkpoint, device="cpu", skip_tokenizer_init=True, dtype="bfloat16")
set_global_server_args_for_scheduler(args)
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.model_loader import get_model
config = ModelConfig.from_server_args(args)
init_distributed_environment(
    backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{out}/group"
)
initialize_model_parallel()
initialize_dp_attention(*(args, config)[-len(inspect.signature(initialize_dp_attention).parameters):])
warnings = []
class Keep(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())
logging.getLogger("sglang.srt.models.deepseek_v4").addHandler(Keep(level=logging.WARNING))
model = get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))
torch.save({name: tensor.detach().clone() for name, tensor in model.named_parameters()}, f"{out}/state.pt")
hf = config.hf_config
facts = {
    "warnings": warnings, "ratios": hf.compress_ratios, "rope": hf.rope_scaling, "num_hash_layers": hf.num_hash_layers,
    "context": config.context_len,
}
json.dump(facts, open(f"{out}/facts.json", "w"))
"""


@pytest.fixture(scope="module")
def loaded(warm, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What SGLang's model holds, and what its loader said."""
    out = tmp_path_factory.mktemp("sglang")
    variables = dict.fromkeys(("SGLANG_OPT_FP8_WO_A_GEMM", "SGLANG_OPT_USE_TILELANG_MHC_PRE"), "0")
    status, output = warm.run_one(Program(["-c", LOAD, str(tiny), str(out)], variables, before=COPIES))
    assert status == 0, output[-3000:]
    return torch.load(out / "state.pt"), json.loads((out / "facts.json").read_text())


def stacked(written: dict[str, torch.Tensor], layer: str, parts: tuple[str, ...]) -> torch.Tensor:
    """The routed experts of a layer, ``parts`` of each one below the other."""
    experts = [f"{layer}ffn.experts.{expert}." for expert in range(SPEC.num_experts)]
    return torch.stack([torch.cat([written[e + part + ".weight"] for part in parts]) for e in experts])


def two_stream_rows(ape: torch.Tensor) -> torch.Tensor:
    """SGLang keeps CSA's position bias as eight rows: four of the first half, then four of the second."""
    if ape.shape[0] != 4:
        return ape
    first, second = ape.chunk(2, dim=1)
    return torch.cat([first, second]).view(4, -1)


def expected_state(written: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What SGLang's model must hold, with what it fuses put together."""
    state = {
        "model.embed_tokens.weight": written["embed.weight"],
        "lm_head.weight": written["head.weight"],
        "model.norm.weight": written["norm.weight"],
        **{f"model.hc_head_{part}": written[f"hc_head_{part}"] for part in ("fn", "base", "scale")},
    }
    kept = ("hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn", "hc_ffn_base", "hc_ffn_scale")
    for layer_id, ratio in enumerate(SPEC.compress_ratios):
        old, new = f"layers.{layer_id}.", f"model.layers.{layer_id}."
        part = {name.removeprefix(old): tensor for name, tensor in written.items() if name.startswith(old)}
        for name in kept:
            state[new + name] = part[name]
        for name in ("attn_sink", "q_norm.weight", "wq_b.weight", "kv_norm.weight", "wo_a.weight", "wo_b.weight"):
            state[f"{new}self_attn.{name}"] = part[f"attn.{name}"]
        state[f"{new}self_attn.wqkv_a.weight"] = torch.cat([part["attn.wq_a.weight"], part["attn.wkv.weight"]])
        compressors = {0: (), 4: ("compressor.", "indexer.compressor."), 128: ("compressor.",)}[ratio]
        for name in compressors:
            state[f"{new}self_attn.{name}ape"] = two_stream_rows(part[f"attn.{name}ape"])
            state[f"{new}self_attn.{name}norm.weight"] = part[f"attn.{name}norm.weight"]
            both = [part[f"attn.{name}{matrix}.weight"] for matrix in ("wkv", "wgate")]
            state[f"{new}self_attn.{name}wkv_gate.weight"] = torch.cat(both)
        for name in ("wq_b", "weights_proj") if ratio == 4 else ():
            state[f"{new}self_attn.indexer.{name}.weight"] = part[f"attn.indexer.{name}.weight"]
        state[new + "input_layernorm.weight"] = part["attn_norm.weight"]
        state[new + "post_attention_layernorm.weight"] = part["ffn_norm.weight"]
        state[new + "mlp.gate.weight"] = part["ffn.gate.weight"]
        if layer_id < SPEC.num_hash_layers:
            state[new + "mlp.topk.tid2eid"] = part["ffn.gate.tid2eid"]
        else:
            state[new + "mlp.gate.e_score_correction_bias"] = part["ffn.gate.bias"]
        state[new + "mlp.experts.w13_weight"] = stacked(written, old, ("w1", "w3"))
        state[new + "mlp.experts.w2_weight"] = stacked(written, old, ("w2",))
        shared = [part[f"ffn.shared_experts.{name}.weight"] for name in ("w1", "w3")]
        state[new + "mlp.shared_experts.gate_up_proj.weight"] = torch.cat(shared)
        state[new + "mlp.shared_experts.down_proj.weight"] = part["ffn.shared_experts.w2.weight"]
    return state


@pytest.mark.sglang
@pytest.mark.slow
def test_every_tensor_arrives_unchanged(tiny: Path, loaded: tuple[dict, dict]):
    state, facts = loaded
    assert facts["warnings"] == []
    expected = expected_state(load_file(tiny / WEIGHTS))
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        got = state[name][: len(tensor)]  # the vocabulary is padded with rows that nothing reads
        assert torch.equal(got.to(tensor.dtype), tensor), name


@pytest.mark.sglang
@pytest.mark.slow
def test_configuration_is_read(loaded: tuple[dict, dict]):
    _, facts = loaded
    assert tuple(facts["ratios"]) == SPEC.compress_ratios
    assert facts["num_hash_layers"] == SPEC.num_hash_layers
    assert facts["context"] == SPEC.config()["max_position_embeddings"]
    scaling = {name: facts["rope"][name] for name in SPEC.config()["rope_scaling"]}
    assert scaling == SPEC.config()["rope_scaling"]


@pytest.mark.sglang
@pytest.mark.slow
def test_sglang_starts_with_the_stand_ins(warm):
    """Its server and model are imported in this process, and found these in the place of compiled packages."""
    code = "import sys; print(*(sys.modules[name].__file__ for name in ('sgl_kernel', 'torchvision')))"
    _, output = warm.run_one(Program(["-c", code]))
    assert output.count("sglang_dsv4_cpu_shims") == 2, output
