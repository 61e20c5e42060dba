"""Asked for, our cache serves or SGLang does not start; not asked for, SGLang is as without the plug-in.

SGLang logs what goes wrong while it loads a plug-in or applies a hook, and goes on. Each test plants one such fault.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install import hooks, versions
from tests.plugin.test_commands import FLAG, LAUNCH, check_refused
from tests.plugin.warm import COPIES, Program

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

ON = {env.COMPRESSED_KV: "1"}
PLAIN_LAUNCH = tuple(part for part in LAUNCH if part != FLAG)

# Written by a launch that goes on to serve: with the fault, and without our check.
SERVES = """
import sglang.srt.entrypoints.http_server as server
def launch(server_args, **_):
    print("SERVES", flush=True)
    raise SystemExit(0)
server.launch_server = launch
"""
UNHOOKED = """
from sglang.srt.plugins.hook_registry import HookRegistry
apply_target = HookRegistry._apply_target.__func__
def fail(cls, target, hooks):
    if target.endswith("{name}"):
        raise RuntimeError("no hook on {name}")
    return apply_target(cls, target, hooks)
HookRegistry._apply_target = classmethod(fail)
"""
MISSING = "import sys; sys.modules['sglang_dsv4.{name}'] = None\n"
# Another plug-in replaces a class whose methods we hook: SGLang hooks the methods of the new one, unless it hides them.
REPLACED = """
from sglang.srt import server_args
class Other(server_args.ServerArgs):
    @classmethod
    def from_cli_args(cls, args):
        return server_args.ServerArgs(model_path=args.model_path, device="cpu")
from sglang.srt.plugins.hook_registry import HookRegistry
apply_hooks = HookRegistry.apply_hooks.__func__
def replace(cls):
    apply_hooks(cls)
    server_args.ServerArgs = Other
HookRegistry.apply_hooks = classmethod(replace)
"""

RESOLVE = versions.installed().resolve.rpartition(".")[2]
FAULTS = {
    **{name: UNHOOKED.format(name=name) for name in ("add_cli_args", "from_cli_args", RESOLVE)},
    "replaced class": REPLACED,
    **{name: MISSING.format(name=name) for name in ("plugin.install.launch", "plugin.install.contract", "errors")},
}
LATER_FAULTS = {
    name: UNHOOKED.format(name=name)
    for name in ("check_server_args", "_build_dsv4_kv_pool", "get_init_info", "_validate_one_request", "run_batch")
}


@pytest.fixture(scope="module")
def launches(warm, tiny):
    """Every faulty launch, by flag and by variable, of a checkpoint that could be served; and without a fault."""
    model = ("--model-path", str(tiny), "--max-total-tokens", "16384")
    programs = {}
    for name, fault in {**FAULTS, **LATER_FAULTS, "none": ""}.items():
        programs["flag", name] = Program([*LAUNCH, *model], before=SERVES + fault)
        programs["variable", name] = Program([*PLAIN_LAUNCH, *model], ON, before=SERVES + fault)
    return warm.run(programs)


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_without_a_fault_the_launch_goes_on(launches, way):
    status, output = launches[way, "none"]
    assert status == 0 and "SERVES" in output, output[-3000:]


@pytest.mark.parametrize("name", FAULTS)
def test_a_flag_that_nothing_would_read_is_unknown(launches, name):
    status, output = launches["flag", name]
    assert status == 2 and "SERVES" not in output
    assert output.splitlines()[-1].endswith(f"error: unrecognized arguments: {FLAG}"), output[-2000:]


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "replaced class"])
def test_the_variable_needs_every_hook_and_module(launches, name):
    status, output = launches["variable", name]
    assert "SERVES" not in output
    check_refused(status, output, name)


@pytest.mark.parametrize("way", ["flag", "variable"])
@pytest.mark.parametrize("name", LATER_FAULTS)
def test_every_later_hook_is_needed(launches, way, name):
    status, output = launches[way, name]
    assert "SERVES" not in output
    check_refused(status, output, "did not apply sglang.")
    assert output.rstrip().endswith(name)


EARLY_ARGUMENTS = """
import sys
from sglang.srt.server_args import ServerArgs
server_args = ServerArgs(model_path=sys.argv[1], device="cpu", load_format="dummy", skip_tokenizer_init=True)
import sglang
from sglang.srt.entrypoints.engine import Engine
Engine._launch_scheduler_processes = lambda *_, **__: print("SERVES", flush=True)
engine = sglang.Engine(server_args=server_args)
"""
LATE_VARIABLE = """
import os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
os.environ["SGLANG_DSV4_COMPRESSED_KV"] = "1"
from sglang.srt.server_args import ServerArgs
args = ServerArgs(model_path=sys.argv[1], device="cpu", max_total_tokens=16384)
getattr(args, "resolve_once", lambda: None)()
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
print("OURS", KVCacheConfigurator._build_dsv4_kv_pool.__code__.co_filename)
"""
DIFFUSION = """
import sglang.cli.serve as serve
serve.get_is_diffusion_model = lambda path: True
"""
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "torch_dtype": "float32",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


def test_arguments_that_were_made_before_the_plug_in_was_loaded_are_checked(warm, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    program = Program(["-c", EARLY_ARGUMENTS, str(tmp_path)])
    status, output = warm.run_one(program)
    assert "SERVES" in output, output[-3000:]
    status, output = warm.run_one(Program(program.argv, ON))
    assert status != 0 and "SERVES" not in output
    assert "expected the architecture DeepseekV4ForCausalLM, got LlamaForCausalLM" in output


def test_a_variable_set_after_the_plug_in_was_loaded_counts(warm, tiny):
    status, output = warm.run_one(Program(["-c", LATE_VARIABLE, str(tiny)]))
    assert status == 0 and "hook_registry.py" in output.partition("OURS")[2], output[-3000:]


@pytest.mark.parametrize("kind", [[], ["--model-type", "diffusion"]], ids=["found", "named"])
def test_sglang_serve_does_not_take_its_diffusion_server(warm, tmp_path, kind):
    """Which would ignore the flag: SGLang hands it arguments that it does not know."""
    serve = "import sys; from sglang.cli.main import main; main()"
    arguments = ["serve", "--model-path", str(tmp_path), *kind]
    for program in (
        Program(["-c", serve, *arguments, FLAG], before=SERVES + DIFFUSION),
        Program(["-c", serve, *arguments], ON, before=SERVES + DIFFUSION),
    ):
        status, output = warm.run_one(program)
        sentence = "--model-type diffusion: not" if kind else "expected a folder with a config.json"
        check_refused(status, output, sentence)


# The hook is in place, and SGLang's launcher goes another way: it keeps the function that was there before.
NEVER_CALLED = """
from sglang.srt import server_args
check = server_args.ServerArgs.check_server_args
from sglang.srt.entrypoints import engine
launch = engine.Engine._launch_subprocesses.__func__
def bypass(cls, server_args, *rest, **options):
    hooked = type(server_args).check_server_args
    type(server_args).check_server_args = check
    try:
        return launch(cls, server_args, *rest, **options)
    finally:
        type(server_args).check_server_args = hooked
engine.Engine._launch_subprocesses = classmethod(bypass)
"""


def test_a_hook_that_nothing_calls_ends_the_server_with_one_sentence(monkeypatch):
    called = hooks.Hook("tests.called", lambda: "ours", "AFTER", at_start=True)
    never = hooks.Hook("tests.never", lambda: "ours", "AFTER", at_start=True)
    unneeded = hooks.Hook("tests.unneeded", lambda: "ours", "AFTER")
    monkeypatch.setenv(env.HOOKS_CALLED, "")
    monkeypatch.setenv(env.COMPRESSED_KV, "1")
    assert hooks.remembering(called)() == hooks.remembering(unneeded)() == "ours"
    hooks.check_called([called, unneeded])
    with pytest.raises(UnsupportedError, match="^hooks: expected to be called .* passed by tests.never$"):
        hooks.check_called([called, never, unneeded])
    # Another process goes by what this one has written; with the flag off nothing is written.
    assert env.get(env.HOOKS_CALLED).split(",")[-1] == "tests.called"
    monkeypatch.setenv(env.COMPRESSED_KV, "0")
    hooks.remembering(never)()
    assert "never" not in env.get(env.HOOKS_CALLED)


@pytest.mark.long
def test_a_server_whose_start_passes_a_hook_by_ends(warm, tiny):
    """The scheduler's last look: all else is in order, but one function of ours was never called."""
    fault = COPIES + NEVER_CALLED
    program = Program([*LAUNCH, "--model-path", str(tiny), "--max-total-tokens", "16384", "--dtype", "bfloat16"], before=fault)
    status, output = warm.run_one(program)
    assert status != 0 and "SERVES" not in output
    sentence = "SGLang passed by sglang.srt.server_args.ServerArgs.check_server_args"
    assert sentence in output, output[-3000:]


# On a CPU attention is eager and takes any dtype; here it goes by another's name.
CALLED_FLASHMLA = """
from sglang_dsv4 import attention
make = attention.make_attention
def called_otherwise(*args, **options):
    made, reason = make(*args, **options)
    made.name = "flashmla"
    return made, reason
attention.make_attention = called_otherwise
from sglang_dsv4.plugin.serve import backend
def serve(*_):
    raise SystemExit("SERVES")
backend.CompressedKVBackend = serve
"""


@pytest.mark.long
def test_a_dtype_that_the_attention_does_not_take_ends_the_launch(warm, tiny):
    model = ("--model-path", str(tiny), "--max-total-tokens", "16384", "--dtype", "float32")
    program = Program([*LAUNCH, *model], before=COPIES + CALLED_FLASHMLA)
    status, output = warm.run_one(program)
    assert status != 0 and "SERVES" not in output
    assert "--dtype float32: expected bfloat16 with attention flashmla" in output, output[-3000:]


def test_a_scheduler_with_another_cache_does_not_become_ready():
    from sglang_dsv4.plugin.install import ready
    from sglang_dsv4.plugin.serve.backend import CompressedKVBackend
    from sglang_dsv4.plugin.serve.pool import CompressedTokenToKVPool

    def scheduler(pool, backend):
        return SimpleNamespace(
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
            tp_worker=SimpleNamespace(model_runner=SimpleNamespace(attn_backend=backend)),
        )

    ours = (object.__new__(CompressedTokenToKVPool), object.__new__(CompressedKVBackend))
    ready.check_serving(scheduler(*ours))
    with pytest.raises(SystemExit, match="not active, the KV pool is builtins.dict"):
        ready.check_serving(scheduler({}, ours[1]))
    with pytest.raises(SystemExit, match="not active, the attention backend is builtins.list"):
        ready.check_serving(scheduler(ours[0], []))


PROBE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang.srt.layers.attention import attention_registry
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.models import deepseek_v4, deepseek_v2
from sglang.srt.utils import common
import argparse, os
args = prepare_server_args(["--model-path", sys.argv[1], "--device", "cpu"])
names = {
    "backend": attention_registry.ATTENTION_BACKENDS["dsv4"],
    "pool": KVCacheConfigurator._build_dsv4_kv_pool,
    "state": Scheduler.get_internal_state,
    "ready": Scheduler.get_init_info,
    "validate": TokenizerManager._validate_one_request,
    "rope": deepseek_v4.fused_rope_inplace,
    "gate": deepseek_v2.MoEGate.forward,
    "triton": common.support_triton,
}
fields = {name: repr(getattr(args, name)) for name in ServerArgs.__annotations__}
for changing in ("random_seed", "port", "nccl_port", "dist_init_addr"):
    fields.pop(changing, None)
def raised(**values):
    try:
        made = ServerArgs.from_cli_args(argparse.Namespace(model_path=sys.argv[1], device="cpu", **values))
        getattr(made, "resolve_once", lambda: None)()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
print("PROBE " + json.dumps({
    "owners": {name: value.__code__.co_filename + ":" + value.__code__.co_name for name, value in names.items()},
    "args": {k: v for k, v in fields.items() if " at 0x" not in v},
    "raised": [raised(), raised(dtype="nonsense"), raised(encoder_only=True, language_only=True)],
    "env": sorted(k for k in os.environ if k.startswith("SGLANG_")),
    "loaded": sorted(m for m in sys.modules if m.partition(".")[0] in ("sglang_dsv4", "dsv4_kernels")),
}))
"""


def test_with_the_flag_off_sglang_is_as_without_the_plug_in(warm, tiny):
    """Same resolved arguments and errors, same functions in every place we would touch, same variables."""
    programs = {
        "off": Program(["-c", PROBE, str(tiny)]),
        "without": Program(["-c", PROBE, str(tiny)], {"SGLANG_PLUGINS": "none"}),
        "on": Program(["-c", PROBE, str(tiny)], ON),
    }
    found = {}
    for name, (_, output) in warm.run(programs).items():
        lines = [line for line in output.splitlines() if line.startswith("PROBE ")]
        assert lines, output[-3000:]
        found[name] = json.loads(lines[0].removeprefix("PROBE "))
    off, without, on = found["off"], found["without"], found["on"]
    without["env"].remove("SGLANG_PLUGINS")
    assert off["owners"] == without["owners"]
    assert off["args"] == without["args"]
    assert off["raised"] == without["raised"] and any(off["raised"]) and not all(off["raised"])
    assert off["env"] == without["env"]
    assert not without["loaded"]
    assert not [name for name in off["loaded"] if "portable" in name or "cache" in name]
    # The twin: with the flag on, every one of them is ours.
    assert all(on["owners"][name] != owner for name, owner in off["owners"].items())


SERVE_LLAMA = """
import json, sys
import sglang
engine = sglang.Engine(
    model_path=sys.argv[1], device="cpu", attention_backend="torch_native", skip_tokenizer_init=True,
    max_total_tokens=1024, mem_fraction_static=0.5,
)
asked = dict(sampling_params={"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}, return_logprob=True)
answers = engine.generate(input_ids=[[1, 2, 3], list(range(40)), list(range(40))], **asked)
print("ANSWERS " + json.dumps([answer["meta_info"]["output_token_logprobs"] for answer in answers]))
engine.shutdown()
"""


@pytest.mark.long
def test_with_the_flag_off_another_model_is_served_as_without_the_plug_in(warm, tmp_path):
    """Real requests; another model, since SGLang's own DeepSeek-V4 needs a GPU."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "initializer_range": 0.3}))
    model.save_pretrained(tmp_path)
    programs = {
        "off": Program(["-c", SERVE_LLAMA, str(tmp_path)]),
        "without": Program(["-c", SERVE_LLAMA, str(tmp_path)], {"SGLANG_PLUGINS": "none"}),
    }
    answers = {}
    for name, (status, output) in warm.run(programs).items():
        lines = [line for line in output.splitlines() if line.startswith("ANSWERS ")]
        assert status == 0 and lines, output[-3000:]
        answers[name] = json.loads(lines[0].removeprefix("ANSWERS "))
    assert answers["off"] == answers["without"]
    short, long, again = answers["off"]
    assert short != long and long == again
    # And they are the model's: each token is the one that transformers would have chosen.
    ids = list(range(40))
    for _, token, _ in long:
        with torch.inference_mode():
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
        ids.append(token)
