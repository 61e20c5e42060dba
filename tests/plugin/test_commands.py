"""The launch command: what it refuses, in one sentence and with a non-zero status; the other commands; and `Engine`."""

import json
import socket
import subprocess
import sys

import pytest

from sglang_dsv4 import env
from tests.plugin.warm import COPIES, LIMIT_S, Program

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

FLAG = "--enable-dsv4-compressed-kv"
LAUNCH = ("-m", "sglang.launch_server", "--device", "cpu", FLAG)


def fake_distribution(folder, name, version):
    """Metadata of a distribution, found before the real one."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


@pytest.fixture(scope="module")
def outcomes(warm, tiny, tmp_path_factory):
    """Every refused launch at once."""
    folder = tmp_path_factory.mktemp("launch")
    other = folder / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    broken = folder / "broken" / "dsv4_kernels"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import a_module_that_is_not_installed\n")
    model = ("--model-path", str(tiny))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launches = {
            "missing checkpoint": Program([*LAUNCH, "--model-path", str(folder / "none")]),
            "other checkpoint": Program([*LAUNCH, "--model-path", str(other)]),
            "page size": Program([*LAUNCH, *model, "--page-size", "64"]),
            "taken port": Program([*LAUNCH, *model, "--port", port]),
            "small window pool": Program([*LAUNCH, *model, "--max-total-tokens", "8192"]),
            "attention": Program([*LAUNCH, *model, "--dsv4-attention", "flashinfer"]),
            "attention's name": Program([*LAUNCH, *model, "--dsv4-attention", "flash"]),
            "dtype": Program([*LAUNCH, *model, "--dtype", "float16"]),
            "version": Program([*LAUNCH, *model], path=[fake_distribution(folder / "fake", "sglang", "0.5.16")]),
            "missing dependency": Program([*LAUNCH, *model], path=[str(broken.parent)]),
        }
        return warm.run(launches)


SENTENCES = {
    "missing checkpoint": "none: expected a folder with a config.json, found none",
    "other checkpoint": "expected the architecture DeepseekV4ForCausalLM, got LlamaForCausalLM",
    "page size": f"--page-size 64: not supported with {FLAG}: pages of DeepSeek-V4 hold 256 tokens",
    "taken port": "expected a free port on 127.0.0.1, but it is taken",
    "small window pool": "window pool: expected 1024 tokens or more, got 768; raise --max-total-tokens",
    "attention": "attention flashinfer: expected the package flashinfer-python",
    "attention's name": "--dsv4-attention: attention: expected one of ('eager', 'flashinfer', 'flashmla'), got 'flash'",
    "dtype": "--dtype float16: expected bfloat16 or float32 with attention eager",
    "version": "sglang: expected version 0.5.17 or 0.5.23, got 0.5.16",
    "missing dependency": "No module named 'a_module_that_is_not_installed'",
}


def check_refused(status, output, sentence):
    assert status not in (0, None), output[-2000:]
    last = [line for line in output.splitlines() if line.strip()][-1]
    assert last.startswith("sglang_dsv4: "), output[-2000:]
    assert sentence in last


@pytest.mark.parametrize("name", SENTENCES)
def test_each_is_one_clear_sentence_and_a_failure(outcomes, name):
    check_refused(*outcomes[name], SENTENCES[name])


@pytest.mark.long
def test_a_process_of_its_own_says_the_same(tiny):
    """One of the launches as a user makes it: the others run in copies of a process with SGLang imported."""
    run = subprocess.run(
        [sys.executable, *LAUNCH, "--model-path", str(tiny), "--page-size", "64"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    check_refused(run.returncode, run.stdout, SENTENCES["page size"])


@pytest.mark.parametrize("arguments", [["doctor"], ["--version"], ["make-tiny", "--help"]])
def test_commands_answer(warm, arguments):
    program = Program(["-m", "sglang_dsv4", *arguments], {"COLUMNS": "200"})
    status, output = warm.run_one(program)
    assert status == 0, output[-2000:]
    if arguments == ["doctor"]:
        assert "Would run on cpu: CompressedKVCache, kernels torch, attention" in output
        assert "MISSING" not in output
        assert "q_norm_rope" in output


ENGINE = """
import sys
import sglang
engine = sglang.Engine(
    model_path=sys.argv[1], max_total_tokens=16384, swa_full_tokens_ratio=0.5, max_running_requests=8
)
greedy = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
first = engine.generate(input_ids=[[10, 11, 12], [20] * 300], sampling_params=greedy)
again = engine.generate(input_ids=[[20] * 300], sampling_params=greedy)
assert [answer["meta_info"]["completion_tokens"] for answer in first] == [6, 6]
assert again[0]["meta_info"]["cached_tokens"] == 256
print("ENGINE", engine.get_server_info()["internal_states"][0]["sglang_dsv4"]["cache"])
engine.shutdown()
"""


@pytest.mark.parametrize("before", [COPIES, pytest.param("", marks=pytest.mark.long)], ids=["copied", "spawned"])
def test_for_an_engine_the_variable_is_enough(warm, tiny, before):
    program = Program(["-c", ENGINE, str(tiny)], {env.COMPRESSED_KV: "1"}, before=before)
    status, output = warm.run_one(program)
    assert status == 0 and "ENGINE CompressedKVCache" in output, output[-3000:]
