"""Each unsupported feature gets one sentence that names it."""

import json
import socket
from types import SimpleNamespace

import pytest

from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install import arguments, checkpoint, contract, machine, refusals, request_checks, versions
from sglang_dsv4.plugin.install.versions import choose, probes
from tests.cache.driver import CONFIG
from tests.plugin import option_classes

ALL = (*refusals.REFUSALS, *versions.installed().refusals)
# What SGLang's own arguments have where nothing was asked for and theirs is none of None and False.
DEFAULTS = {refusal.field: value for refusal in ALL for value in refusal.allowed}
# What asks for a feature: a switch is on, a number is above one, and these have names.
ASKS = {
    "page_size": 64,
    "disaggregation_mode": "prefill",
    "radix_cache_backend": "other",
    "kv_canary": "raise",
    "quantization_param_path": "scales.json",
    "speculative_algorithm": "EAGLE",
    "kv_cache_dtype": "bfloat16",
    "prefill_attention_backend": "triton",
    "decode_attention_backend": "torch_native",
    "cuda_graph_backend_prefill": "breakable",
    "cuda_graph_backend_decode": "tc_piecewise",
    "dllm_algorithm": "LowConfidence",
    "startup_weight_load_mode": "overlap",
    "dsv4_attn_backend": "trtllm",
    "dsv4_prefill_backend": "flashmla_sparse_q8",
}


def test_what_asks_for_nothing_is_accepted():
    refusals.check_arguments(SimpleNamespace())
    for refusal in ALL:
        for value in (None, False, *refusal.allowed):
            refusals.check_arguments(SimpleNamespace(**{**DEFAULTS, refusal.field: value}))


@pytest.mark.parametrize("refusal", ALL, ids=lambda refusal: refusal.field)
def test_each_feature_is_refused_by_name_with_its_reason(refusal):
    value = ASKS.get(refusal.field, 2 if 1 in refusal.allowed else True)
    with pytest.raises(UnsupportedError, match=f"^{refusal.option} {value}: not supported with .*: .+"):
        refusals.check_arguments(SimpleNamespace(**{**DEFAULTS, refusal.field: value}))


@pytest.mark.sglang
def test_every_option_that_speaks_of_a_cache_has_been_read():
    """A refusal whose option was renamed would never fire, and a new option would pass by the cache in silence."""
    from sglang.srt.server_args import ServerArgs

    fields, refused = set(ServerArgs.__annotations__), {refusal.field for refusal in ALL}
    assert refused <= fields
    speaking = {name for name in fields if option_classes.SPEAKS_OF_A_CACHE.search(name)}
    assert not [name for name in sorted(speaking) if option_classes.kind_of(name, refused) is None]
    # The twin: options of no version.
    assert option_classes.kind_of("enable_other_kv_cache", refused) is None
    assert option_classes.kind_of("page_size", refused - {"page_size"}) is None


@pytest.mark.parametrize("variable", refusals.REFUSED_VARIABLES, ids=lambda variable: variable.name)
def test_variables_that_lay_out_another_cache_are_refused(monkeypatch, variable):
    for value in variable.allowed:
        monkeypatch.setenv(variable.name, value.upper())
        refusals.check_environment()
    monkeypatch.setenv(variable.name, "v41" if "LAYOUT" in variable.name else "1")
    with pytest.raises(UnsupportedError, match=f"^{variable.name}=.*: not supported with .*: .+"):
        refusals.check_environment()


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
        machine.check_device(device, capability)


def test_a_cpu_and_gpus_from_sm80_on_are_accepted():
    machine.check_device("cpu", None)
    machine.check_device("cuda", (8, 0))
    machine.check_device("cuda:3", (9, 0))


def test_another_device_than_the_plug_in_was_loaded_for_is_refused(monkeypatch):
    """Portable ops and SGLang's switches are chosen when a process loads the plug-in."""
    monkeypatch.delenv(env.DEVICE, raising=False)
    arguments.check_device("cpu")
    monkeypatch.setenv(env.DEVICE, "cpu")
    arguments.check_device("cpu")
    monkeypatch.setenv(env.DEVICE, "cuda")
    with pytest.raises(UnsupportedError, match=f"--device cpu: expected cuda.* set {env.DEVICE}="):
        arguments.check_device("cpu")
    assert machine.found_device("cuda:1") == "cuda:1"


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
            machine.check_dtype(dtype, attention)
            continue
        message = f"^--dtype {dtype}: expected {expected} with attention {attention}$"
        with pytest.raises(UnsupportedError, match=message):
            machine.check_dtype(dtype, attention)


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
    assert checkpoint.handed_heads(heads, ranks) == handed


@pytest.mark.parametrize(("field", "found"), [({}, True), ({"quant_method": "fp8"}, False)])
def test_quantisation_is_read_from_the_checkpoint(tmp_path, field, found):
    config = checkpoint.read_config(write_config(tmp_path, quantization_config=field))
    assert checkpoint.is_unquantised(config) is found


def write_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["DeepseekV4ForCausalLM"], **fields}))
    return str(folder)


def check(path, options=None):
    return checkpoint.check_config(checkpoint.read_config(path), path, options or {})


def test_checkpoints(tmp_path):
    spec = check(write_config(tmp_path), {"row_format": "fp8_584", "index_format": "fp8"})
    assert (spec.page_tokens, spec.row_format) == (256, "fp8_584")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: str(path / "missing"), "expected a folder with a config.json, found none"),
        (lambda path: write_config(path, architectures=["LlamaForCausalLM"]), "got LlamaForCausalLM"),
        (lambda path: write_config(path, architectures=None), "got none"),
        (lambda path: write_config(path, compress_ratios=[0, 2, 1]), "V4.1"),
        (lambda path: write_config(path, architectures=["DeepseekV41ForCausalLM"]), "V4.1 .DeepseekV41ForCausalLM.: not"),
        (lambda path: write_config(path, model_type="deepseek_v41"), "DeepSeek-V4.1 .*: not supported"),
        (lambda path: write_config(path, kv_source_layer_ids=[0, 1]), "DeepSeek-V4.1 .*: not supported"),
        (lambda path: write_config(path, compress_ratios=None, layer_types=["sliding_attention"]), "no compress_ratios"),
    ],
)
def test_unusable_checkpoints_are_named(tmp_path, make, message):
    with pytest.raises(UnsupportedError, match=message):
        check(make(tmp_path))


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedError, match="config.json is not JSON"):
        check(str(tmp_path))


def test_a_context_beyond_the_rotations_is_refused(tmp_path):
    path = write_config(tmp_path, max_position_embeddings=1024)
    checkpoint.check_context(checkpoint.read_config(path), None)
    checkpoint.check_context(checkpoint.read_config(path), 1024)
    with pytest.raises(UnsupportedError, match="--context-length 1025: expected at most 1024, .*--json-model-override-args"):
        checkpoint.check_context(checkpoint.read_config(path), 1025)
    longer = checkpoint.read_config(path, '{"max_position_embeddings": 4096}')
    checkpoint.check_context(longer, 4096)
    for overrides in ("{", "[1]"):
        with pytest.raises(UnsupportedError, match="--json-model-override-args .*: expected a JSON object"):
            checkpoint.read_config(path, overrides)


@pytest.mark.parametrize("field", ["input_embeds", "replace_embeds", "positional_embed_overrides"])
def test_embeddings_in_place_of_tokens_are_refused(field):
    manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=10))
    request_checks.check_request(None, manager, SimpleNamespace(**{field: None}), [0, 9])
    with pytest.raises(ValueError, match=f"^{field}: not supported; .* needs input_ids or text"):
        request_checks.check_request(None, manager, SimpleNamespace(**{field: [[0.5]]}), [1])
    with pytest.raises(ValueError, match="input_ids: expected ids of 0 .. 9, got 10"):
        request_checks.check_request(None, manager, SimpleNamespace(), [10])


def test_a_taken_port_is_refused_and_a_freed_one_is_not():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(UnsupportedError, match=f"--port {port}: expected a free port on 127.0.0.1"):
            machine.check_port("127.0.0.1", port)
    machine.check_port("127.0.0.1", port)


def test_a_window_pool_that_would_hang_is_refused():
    refusals.check_window_pool(1024)
    with pytest.raises(UnsupportedError, match="window pool: expected 1024 tokens or more, got 768; raise --max-total"):
        refusals.check_window_pool(768)


def asked(**values):
    return SimpleNamespace(**{"max_total_tokens": 10240, "swa_full_tokens_ratio": 0.1, "page_size": 256, **values})


def test_the_window_pool_that_was_asked_for():
    old, new = versions.SERVED
    assert old.asked_window_tokens(asked()) == 1024
    assert old.asked_window_tokens(asked(max_total_tokens=None)) is None
    assert new.asked_window_tokens(asked(_swa_full_tokens_ratio_explicitly_set=True, max_running_requests=8)) == 1024
    assert new.asked_window_tokens(asked(_swa_full_tokens_ratio_explicitly_set=False, max_running_requests=None)) == 1024
    # By requests: SGLang's configurator knows, and the pool is checked when it is built.
    assert new.asked_window_tokens(asked(_swa_full_tokens_ratio_explicitly_set=False, max_running_requests=8)) is None


def test_versions_are_told_apart_by_what_they_do():
    for version in versions.SERVED:
        assert choose.choose(dict(version.answers), versions.SERVED) is version
    old, new = versions.SERVED
    assert all(old.answers[probe] is not new.answers[probe] for probe in probes.EARLY | probes.LATE)
    between = {**new.answers, probes.NORM_ROPE: False}
    with pytest.raises(
        UnsupportedError, match=f"expected version 0.5.17 or 0.5.23, got .*, which differs in: {probes.NORM_ROPE}: F"
    ):
        choose.choose(between, versions.SERVED)


@pytest.mark.parametrize("found", ["0.5.16", "0.5.20", "0.6.0", None])
def test_other_versions_of_sglang_are_refused(monkeypatch, found):
    monkeypatch.setattr(choose, "distribution", lambda: found)
    with pytest.raises(UnsupportedError, match=f"sglang: expected version 0.5.17 or 0.5.23, got {found or 'none'}"):
        versions.check_installed()


@pytest.mark.sglang
def test_the_contract_holds_on_the_installed_sglang():
    names = contract.names_of(versions.check_installed())
    contract.check_names(names)
    renamed = contract.ContractName("sglang.srt.server_args.ServerArgs.add_cli_arguments", "")
    with pytest.raises(UnsupportedError, match="missing: sglang.srt.server_args.ServerArgs.add_cli_arguments"):
        contract.check_names((*names, renamed))
