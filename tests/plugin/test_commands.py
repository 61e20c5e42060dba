"""The launch command: what it refuses, in one sentence and with a non-zero status; and SGLang with the flag off."""

import json
import socket
import subprocess
import sys

import pytest

from sglang_dsv4 import env
from sglang_dsv4.tiny import TinySpec, write_tiny_checkpoint

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

LIMIT_S = 240


def start(arguments, **variables):
    """``python -m sglang.launch_server`` with the flag, in its own process."""
    return subprocess.Popen(
        [sys.executable, "-m", "sglang.launch_server", "--device", "cpu", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**env.snapshot(), "OMP_NUM_THREADS": "1", **variables},
    )


def fake_distribution(folder, name, version):
    """Metadata of a distribution, found before the real one."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Every refused launch at once; SGLang's imports take most of the time."""
    folder = tmp_path_factory.mktemp("launch")
    tiny, other = folder / "tiny", folder / "other"
    write_tiny_checkpoint(tiny, TinySpec())
    other.mkdir()
    (other / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )
    broken = folder / "broken" / "dsv4_kernels"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import a_module_that_is_not_installed\n")
    flag, model = "--enable-dsv4-compressed-kv", ("--model-path", str(tiny))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launches = {
            "missing checkpoint": ([flag, "--model-path", str(folder / "none")], {}),
            "other checkpoint": ([flag, "--model-path", str(other)], {}),
            "page size": ([flag, *model, "--page-size", "64"], {}),
            "taken port": ([flag, *model, "--port", port], {}),
            "small window pool": ([flag, *model, "--max-total-tokens", "8192"], {}),
            "version": (
                [flag, *model],
                {"PYTHONPATH": fake_distribution(folder / "fake", "sglang", "0.5.16")},
            ),
            "missing dependency": ([flag, *model], {"PYTHONPATH": str(broken.parent)}),
        }
        running = {
            name: start(list(arguments), **extra) for name, (arguments, extra) in launches.items()
        }
        found = {}
        for name, process in running.items():
            output, _ = process.communicate(timeout=LIMIT_S)
            found[name] = process.returncode, output
    return found


SENTENCES = {
    "missing checkpoint": "none: expected a folder with a config.json, found none",
    "other checkpoint": "expected the architecture DeepseekV4ForCausalLM, got LlamaForCausalLM",
    "page size": "--page-size 64: not supported with --enable-dsv4-compressed-kv: pages of DeepSeek-V4 hold 256 tokens",
    "taken port": "expected a free port on 127.0.0.1, but it is taken",
    "small window pool": "window pool: expected 1024 tokens or more, got 768; raise --max-total-tokens",
    "version": "sglang: expected version 0.5.17, got 0.5.16",
    "missing dependency": "No module named 'a_module_that_is_not_installed'",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_each_is_one_clear_sentence_and_a_failure(outcomes, name):
    status, output = outcomes[name]
    assert status not in (0, None), output[-2000:]
    last = [line for line in output.splitlines() if line.strip()][-1]
    assert last.startswith("sglang_dsv4: "), output[-2000:]
    assert SENTENCES[name] in last


PROBE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from sglang.srt.layers.attention import attention_registry
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.models import deepseek_v4, deepseek_v2
from sglang.srt.utils import common
import dataclasses, os
args = prepare_server_args(["--model-path", sys.argv[1], "--device", "cpu"])
names = {
    "backend": attention_registry.ATTENTION_BACKENDS["dsv4"],
    "pool": KVCacheConfigurator._build_dsv4_kv_pool,
    "state": Scheduler.get_internal_state,
    "validate": TokenizerManager._validate_one_request,
    "rope": deepseek_v4.fused_rope_inplace,
    "gate": deepseek_v2.MoEGate.forward,
    "triton": common.support_triton,
}
fields = {f.name: repr(getattr(args, f.name)) for f in dataclasses.fields(args)}
for changing in ("random_seed", "port", "nccl_port", "dist_init_addr"):
    fields.pop(changing, None)
print("PROBE " + json.dumps({
    "owners": {name: value.__code__.co_filename + ":" + value.__code__.co_name for name, value in names.items()},
    "args": {k: v for k, v in fields.items() if " at 0x" not in v},
    "env": sorted(k for k in os.environ if k.startswith("SGLANG_")),
    "loaded": sorted(m for m in sys.modules if m.partition(".")[0] in ("sglang_dsv4", "dsv4_kernels")),
}))
"""


def test_with_the_flag_off_sglang_is_as_without_the_plug_in(tmp_path):
    """Same resolved arguments, same functions in every place we would touch, same variables; none of our code loaded."""
    tiny = tmp_path / "tiny"
    write_tiny_checkpoint(tiny, TinySpec())

    def probe(**variables):
        return subprocess.Popen(
            [sys.executable, "-c", PROBE, str(tiny)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **env.snapshot(),
                "SGLANG_USE_CPU_ENGINE": "1",
                "OMP_NUM_THREADS": "1",
                **variables,
            },
        )

    cases = {
        "off": probe(),
        "without": probe(SGLANG_PLUGINS="none"),
        "on": probe(**{env.COMPRESSED_KV: "1"}),
    }
    found = {}
    for name, process in cases.items():
        output, errors = process.communicate(timeout=LIMIT_S)
        lines = [line for line in output.splitlines() if line.startswith("PROBE ")]
        assert lines, errors[-3000:]
        found[name] = json.loads(lines[0].removeprefix("PROBE "))
    off, without, on = found["off"], found["without"], found["on"]
    without["env"].remove("SGLANG_PLUGINS")
    assert off["owners"] == without["owners"]
    assert off["args"] == without["args"]
    assert off["env"] == without["env"]
    assert not without["loaded"]
    assert not [name for name in off["loaded"] if "portable" in name or "cache" in name]
    # The twin: with the flag on, every one of them is ours.
    assert all(on["owners"][name] != owner for name, owner in off["owners"].items())


@pytest.mark.parametrize("arguments", [["doctor"], ["--version"], ["make-tiny", "--help"]])
def test_commands_answer(arguments):
    run = subprocess.run(
        [sys.executable, "-m", "sglang_dsv4", *arguments],
        capture_output=True,
        text=True,
        env={**env.snapshot(), "SGLANG_USE_CPU_ENGINE": "1", "COLUMNS": "200"},
        timeout=LIMIT_S,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    if arguments == ["doctor"]:
        assert "Would run: CompressedKVCache, attention eager on cpu" in run.stdout
        assert "MISSING" not in run.stdout
        assert "q_norm_rope" in run.stdout
