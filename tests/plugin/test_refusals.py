"""Each unsupported feature gets one sentence that names it."""

import json
import socket
from types import SimpleNamespace

import pytest

from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install import contract, refusals
from tests.cache.driver import CONFIG

SUPPORTED = {
    "page_size": None,
    "disaggregation_mode": "null",
    "enable_hisparse": False,
    "enable_hierarchical_cache": False,
    "pp_size": 1,
    "enable_prefill_cp": False,
    "dcp_size": 1,
    "speculative_algorithm": None,
    "enable_two_batch_overlap": False,
    "enable_deepseek_v4_fp4_indexer": False,
    "kv_cache_dtype": "auto",
    "prefill_attention_backend": None,
    "decode_attention_backend": None,
    "enable_dp_attention": False,
    "enable_deterministic_inference": False,
    "use_ray": False,
    "tokenizer_worker_num": 1,
    "enable_pdmux": False,
    "enable_torch_compile": False,
    "enable_memory_saver": False,
    "debug_cuda_graph": False,
    "cuda_graph_backend_prefill": None,
    "cuda_graph_backend_decode": "full",
    "dllm_algorithm": None,
}
UNSUPPORTED = {
    "page_size": 64,
    "disaggregation_mode": "prefill",
    "enable_hisparse": True,
    "enable_hierarchical_cache": True,
    "pp_size": 2,
    "enable_prefill_cp": True,
    "dcp_size": 2,
    "speculative_algorithm": "EAGLE",
    "enable_two_batch_overlap": True,
    "enable_deepseek_v4_fp4_indexer": True,
    "kv_cache_dtype": "bfloat16",
    "prefill_attention_backend": "triton",
    "decode_attention_backend": "torch_native",
    "enable_dp_attention": True,
    "enable_deterministic_inference": True,
    "use_ray": True,
    "tokenizer_worker_num": 2,
    "enable_pdmux": True,
    "enable_torch_compile": True,
    "enable_memory_saver": True,
    "debug_cuda_graph": True,
    "cuda_graph_backend_prefill": "breakable",
    "cuda_graph_backend_decode": "tc_piecewise",
    "dllm_algorithm": "LowConfidence",
}


def test_what_sglang_resolves_by_default_is_accepted():
    refusals.check_arguments(SimpleNamespace(**SUPPORTED))
    refusals.check_arguments(SimpleNamespace(**{**SUPPORTED, "page_size": 256, "kv_cache_dtype": "fp8_e4m3"}))


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED.items())
def test_each_feature_is_refused_by_name_with_its_reason(name, value):
    option = "--" + name.replace("_", "-")
    with pytest.raises(UnsupportedError, match=f"^{option} {value}: not supported with .*: .+"):
        refusals.check_arguments(SimpleNamespace(**{**SUPPORTED, name: value}))


@pytest.mark.sglang
def test_every_refused_option_is_one_of_sglangs():
    """A refusal whose option SGLang renamed would never fire."""
    import dataclasses

    from sglang.srt.server_args import ServerArgs

    fields = {field.name for field in dataclasses.fields(ServerArgs)}
    named = {refusal.option.removeprefix("--").replace("-", "_") for refusal in refusals.REFUSALS}
    assert named <= fields
    assert named == set(SUPPORTED)


@pytest.mark.parametrize(
    ("device", "capability", "message"),
    [
        ("npu", None, "--device npu: expected cpu or cuda"),
        ("xpu", None, "--device xpu: expected cpu or cuda"),
        ("hip", None, "--device hip: expected cpu or cuda"),
        ("cuda", None, "--device cuda: expected an NVIDIA GPU, torch finds none"),
        ("cuda:1", (7, 5), "--device cuda:1: expected SM80 or later, got SM75"),
    ],
)
def test_other_devices_are_refused(device, capability, message):
    with pytest.raises(UnsupportedError, match=f"^{message}"):
        refusals.check_device(device, capability)


def test_a_cpu_and_gpus_from_sm80_on_are_accepted():
    refusals.check_device("cpu", None)
    refusals.check_device("cuda", (8, 0))
    refusals.check_device("cuda:3", (9, 0))


def test_another_device_than_the_plug_in_was_loaded_for_is_refused(monkeypatch):
    """Portable ops and SGLang's switches are chosen when a process loads the plug-in."""
    from sglang_dsv4.plugin.install import activation

    monkeypatch.delenv(env.DEVICE, raising=False)
    activation.check_device("cpu")
    monkeypatch.setenv(env.DEVICE, "cpu")
    activation.check_device("cpu")
    monkeypatch.setenv(env.DEVICE, "cuda")
    with pytest.raises(UnsupportedError, match=f"--device cpu: expected cuda.* set {env.DEVICE}="):
        activation.check_device("cpu")
    assert activation.found_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    ("attention", "taken", "expected"),
    [
        ("eager", ("auto", "bfloat16", "float32", "float"), "bfloat16 or float32"),
        ("flashinfer", ("auto", "bfloat16"), "bfloat16"),
        ("flashmla", ("auto", "bfloat16"), "bfloat16"),
    ],
)
def test_dtypes_that_an_attention_does_not_take_are_refused(attention, taken, expected):
    for dtype in ("auto", "half", "float16", "bfloat16", "float", "float32"):
        if dtype in taken:
            refusals.check_dtype(dtype, attention)
            continue
        message = f"^--dtype {dtype}: expected {expected} with attention {attention}$"
        with pytest.raises(UnsupportedError, match=message):
            refusals.check_dtype(dtype, attention)


def test_graphs_that_sglang_resolved_to_are_checked():
    def config(prefill, decode):
        return SimpleNamespace(prefill=SimpleNamespace(backend=prefill), decode=SimpleNamespace(backend=decode))

    refusals.check_graphs(config("disabled", "full"))
    refusals.check_graphs(config("disabled", "disabled"))
    with pytest.raises(UnsupportedError, match="graphs of prefill: expected disabled, got breakable"):
        refusals.check_graphs(config("breakable", "full"))
    with pytest.raises(UnsupportedError, match="of decode: expected full or disabled, got break"):
        refusals.check_graphs(config("disabled", "breakable"))


@pytest.mark.parametrize(
    ("heads", "ranks", "handed"), [(64, 1, 64), (64, 2, 64), (64, 8, 64), (128, 1, 128), (128, 2, 64), (256, 2, 256)]
)
def test_heads_of_a_rank_are_filled_up_as_sglang_does(heads, ranks, handed):
    assert refusals.handed_heads(heads, ranks) == handed


@pytest.mark.parametrize(("field", "found"), [({}, True), ({"quant_method": "fp8"}, False)])
def test_quantisation_is_read_from_the_checkpoint(tmp_path, field, found):
    path = write_config(tmp_path, quantization_config=field)
    assert refusals.is_unquantised(path) is found


def write_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["DeepseekV4ForCausalLM"], **fields}))
    return str(folder)


def test_checkpoints(tmp_path):
    spec = refusals.check_checkpoint(write_config(tmp_path), {"row_format": "fp8_584", "index_format": "fp8"})
    assert (spec.page_tokens, spec.row_format) == (256, "fp8_584")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: str(path / "missing"), "expected a folder with a config.json, found none"),
        (lambda path: write_config(path, architectures=["LlamaForCausalLM"]), "got LlamaForCausalLM"),
        (lambda path: write_config(path, architectures=None), "got none"),
        (lambda path: write_config(path, compress_ratios=[0, 2, 1]), "V4.1"),
    ],
)
def test_unusable_checkpoints_are_named(tmp_path, make, message):
    with pytest.raises(UnsupportedError, match=message):
        refusals.check_checkpoint(make(tmp_path), {})


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedError, match="config.json is not JSON"):
        refusals.check_checkpoint(str(tmp_path), {})


def test_a_taken_port_is_refused_and_a_freed_one_is_not():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(UnsupportedError, match=f"--port {port}: expected a free port on 127.0.0.1"):
            refusals.check_port("127.0.0.1", port)
    refusals.check_port("127.0.0.1", port)


def test_a_window_pool_that_would_hang_is_refused():
    assert refusals.window_tokens(10240, 0.1) == 1024
    refusals.check_window_pool(refusals.window_tokens(10240, 0.1))
    with pytest.raises(UnsupportedError, match="window pool: expected 1024 tokens or more, got 768; raise --max-total"):
        refusals.check_window_pool(refusals.window_tokens(8192, 0.1))


@pytest.mark.parametrize("version", ["0.5.16", "0.6.0", None])
def test_other_versions_of_sglang_are_refused(version):
    with pytest.raises(UnsupportedError, match=f"sglang: expected version 0.5.17, got {version or 'none'}"):
        contract.check_version(version)


@pytest.mark.sglang
def test_the_contract_holds_on_the_installed_sglang():
    contract.check_version(contract.installed_version())
    contract.check_names()
    renamed = contract.ContractName("sglang.srt.server_args.ServerArgs.add_cli_arguments", "")
    with pytest.raises(UnsupportedError, match="missing: sglang.srt.server_args.ServerArgs.add_cli_arguments"):
        contract.check_names((*contract.CONTRACT, renamed))
