"""Each unsupported feature gets one sentence that names it."""

import json
import socket
from types import SimpleNamespace

import pytest

from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin import contract, refusals
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
    "dllm_algorithm": "LowConfidence",
}


def test_what_sglang_resolves_by_default_is_accepted():
    refusals.check_arguments(SimpleNamespace(**SUPPORTED))
    refusals.check_arguments(
        SimpleNamespace(**{**SUPPORTED, "page_size": 256, "kv_cache_dtype": "fp8_e4m3"})
    )


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
    ("device", "has_cuda"),
    [("cuda", True), (None, True), ("npu", False), ("xpu", False), ("hip", False)],
)
def test_other_devices_are_refused(device, has_cuda):
    with pytest.raises(UnsupportedError, match=f"--device {device or 'cuda'}: expected cpu"):
        refusals.check_device(device, has_cuda=has_cuda)


def test_the_cpu_is_accepted():
    refusals.check_device("cpu", has_cuda=True)
    refusals.check_device(None, has_cuda=False)


def write_config(folder, **fields):
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "architectures": ["DeepseekV4ForCausalLM"], **fields})
    )
    return str(folder)


def test_checkpoints(tmp_path):
    spec = refusals.check_checkpoint(
        write_config(tmp_path), {"row_format": "fp8_584", "index_format": "fp8"}
    )
    assert (spec.page_tokens, spec.row_format) == (256, "fp8_584")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: str(path / "missing"), "expected a folder with a config.json, found none"),
        (
            lambda path: write_config(path, architectures=["LlamaForCausalLM"]),
            "got LlamaForCausalLM",
        ),
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
        with pytest.raises(
            UnsupportedError, match=f"--port {port}: expected a free port on 127.0.0.1"
        ):
            refusals.check_port("127.0.0.1", port)
    refusals.check_port("127.0.0.1", port)


def test_a_window_pool_that_would_hang_is_refused():
    assert refusals.window_tokens(10240, 0.1) == 1024
    refusals.check_window_pool(refusals.window_tokens(10240, 0.1))
    with pytest.raises(
        UnsupportedError,
        match="window pool: expected 1024 tokens or more, got 768; raise --max-total",
    ):
        refusals.check_window_pool(refusals.window_tokens(8192, 0.1))


@pytest.mark.parametrize("version", ["0.5.16", "0.6.0", None])
def test_other_versions_of_sglang_are_refused(version):
    with pytest.raises(
        UnsupportedError, match=f"sglang: expected version 0.5.17, got {version or 'none'}"
    ):
        contract.check_version(version)


@pytest.mark.sglang
def test_the_contract_holds_on_the_installed_sglang():
    contract.check_version(contract.installed_version())
    contract.check_names()
    renamed = contract.ContractName("sglang.srt.server_args.ServerArgs.add_cli_arguments", "")
    with pytest.raises(
        UnsupportedError, match="missing: sglang.srt.server_args.ServerArgs.add_cli_arguments"
    ):
        contract.check_names((*contract.CONTRACT, renamed))
