"""What a user may pass, what comes back, and what is refused at once with one sentence."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch

from sglang_dsv4.errors import UnknownRequestError, UnsupportedError
from sglang_dsv4.runtime import checkpoint as checkpoints
from sglang_dsv4.runtime.handle import Handle
from sglang_dsv4.runtime.runtime import Runtime
from tests.runtime.worlds import assert_greedy, assert_nothing_held, make_runtime, make_tokens


@pytest.fixture(scope="module")
def runtime(small_checkpoint):
    return make_runtime(small_checkpoint, debug=True)


def test_tokens_are_of_one_type(runtime):
    handle = runtime.open(make_tokens(20))
    before = handle.tokens
    done = handle.generate(4, stop=())
    assert handle.tokens == before + done.tokens
    assert handle.snapshot().tokens == handle.tokens


def test_a_text_or_a_handle_is_one_prompt(runtime):
    whole, listed = runtime.generate("Tea", 4, stop=()), runtime.generate(["Tea"], 4, stop=())
    assert len(whole) == 1 and whole[0].tokens == listed[0].tokens
    handle = runtime.open("Tea")
    (done,) = runtime.generate(handle, 4, stop=())
    assert done.tokens == whole[0].tokens and handle.seq_len == 7


@pytest.mark.parametrize("given", [np.array([70, 71]), torch.tensor([70, 71]), (70, 71), range(70, 72)], ids=repr)
def test_ids_of_any_integer_type(runtime, given):
    assert runtime.open(given).tokens == (70, 71)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda runtime, handle: runtime.open(b"abc"), "prompt: expected a text or token ids, got bytes"),
        (lambda runtime, handle: runtime.open(None), "prompt: expected a text or token ids, got NoneType"),
        (lambda runtime, handle: runtime.open(5), "prompt: expected a text or token ids, got int"),
        (lambda runtime, handle: runtime.open({70: 1}), "prompt: expected a text or token ids, got dict"),
        (lambda runtime, handle: runtime.generate([5, 6], 1), "prompt: expected a text or token ids, got int"),
        (lambda runtime, handle: runtime.generate(5, 1), "prompts: expected a text, a handle or a list of prompts, got int"),
        (lambda runtime, handle: runtime.generate(["a"], 2.5), "max_new_tokens: expected a whole number, got 2.5"),
        (lambda runtime, handle: handle.generate(2.5), "n: expected a whole number, got 2.5"),
        (lambda runtime, handle: handle.generate("x"), "n: expected a whole number, got 'x'"),
        (lambda runtime, handle: handle.generate(True), "n: expected a whole number, got True"),
        (lambda runtime, handle: handle.generate(1, seed="x"), "seed: expected a whole number, got 'x'"),
        (lambda runtime, handle: handle.generate(1, temperature="x"), "temperature: expected a number, got 'x'"),
        (lambda runtime, handle: handle.generate(1, temperature=None), "temperature: expected a number, got None"),
        (lambda runtime, handle: handle.truncate(None), "n: expected a whole number, got None"),
        (lambda runtime, handle: handle.truncate(2.0), "n: expected a whole number, got 2.0"),
        (lambda runtime, handle: handle.append([1.5]), "token ids: expected integers, got 1.5"),
    ],
)
def test_types_are_checked_at_the_door(runtime, call, message):
    handle = runtime.open(make_tokens(9))
    with pytest.raises(TypeError) as refusal:
        call(runtime, handle)
    assert str(refusal.value) == message
    assert handle.tokens == tuple(make_tokens(9))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_pages": "64"}, TypeError, "num_pages: expected a whole number, got '64'"),
        ({"num_pages": 0}, ValueError, "num_pages: expected 1 or more, got 0"),
        ({"max_requests": 1.5}, TypeError, "max_requests: expected a whole number, got 1.5"),
        ({"device": "tpu"}, UnsupportedError, "device: expected cpu or cuda, got 'tpu'"),
        ({"device": "cuda:7"}, UnsupportedError, "device cuda:7: expected a CUDA device that torch can use, found "),
        ({"num_pages": 10**9}, UnsupportedError, "num_pages 1000000000: expected a cache that fits into the "),
        ({"num_pages": 10**30}, UnsupportedError, "num_pages 1" + 30 * "0"),
    ],
    ids=str,
)
def test_a_runtime_that_cannot_be_is_refused_before_the_model_is_loaded(small_checkpoint, monkeypatch, options, error, message):
    monkeypatch.setattr(checkpoints.DeepseekV4ForCausalLM, "from_pretrained", None)
    with pytest.raises(error) as refusal:
        make_runtime(small_checkpoint, **options)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("name", ["/no/such", "./no/such", "nosuch", "~/no/such", "a/b/c"])
def test_a_path_that_is_none_never_reaches_the_hub(monkeypatch, name):
    monkeypatch.setattr(checkpoints.AutoConfig, "from_pretrained", None)
    with pytest.raises(UnsupportedError) as refusal:
        Runtime(name)
    assert str(refusal.value) == (
        f"{name}: expected a folder with a config.json, or a name such as owner/model; found no such folder"
    )


def test_files_that_are_not_whole_are_named(small_checkpoint, tmp_path):
    copy = shutil.copytree(small_checkpoint, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UnsupportedError, match="model.safetensors: expected a whole safetensors file, got: "):
        make_runtime(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UnsupportedError, match="copy: expected a folder with a config.json, found none"):
        make_runtime(copy)


def test_a_later_model_is_refused_as_everywhere(small_checkpoint, tmp_path):
    copy = shutil.copytree(small_checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "compress_ratios": [0, 1, 2]}))
    with pytest.raises(UnsupportedError, match="V4.1"):
        make_runtime(copy)


def test_what_is_shown(runtime):
    handle = runtime.open("a <leaf>")
    assert repr(handle) == "Handle(seq_len=8)" and handle._repr_html_().endswith("<em>… a &lt;leaf&gt;</em>")
    shown = repr(runtime)
    assert "float32 on cpu" in shown and "1 sequences open" in shown and "history pages free" in shown
    assert runtime._repr_html_().startswith("<code>Runtime(")
    handle.close()
    assert repr(handle) == "Handle(seq_len=8, closed)"
    names = [name for name in dir(runtime) if not name.startswith("_")]
    assert names == ["cache", "engine", "generate", "load", "open", "prune", "report", "restore", "save", "spec", "text"]
    assert "extend" not in dir(Handle)


def test_threads_share_a_runtime(small_checkpoint, small_oracle):
    """Each call is whole: what three threads get is what one would."""
    runtime = make_runtime(small_checkpoint, debug=True)
    base = runtime.open(make_tokens(140))
    found, faults = {}, []

    def work(number):
        try:
            for turn in range(3):
                twin = base.fork().append(make_tokens(3, salt=number))
                found[number, turn] = (twin.tokens, twin.generate(6, stop=()).tokens)
                twin.close()
        except (RuntimeError, ValueError, AssertionError) as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == [] and len(found) == 9
    for (number, _), (prompt, generated) in found.items():
        assert found[number, 0] == (prompt, generated)
        assert_greedy(small_oracle, list(prompt), generated)
    base.close()
    assert_nothing_held(runtime)


def test_a_closed_handle_is_refused_in_another_thread_too(runtime):
    handle = runtime.open(make_tokens(5))
    handle.close()
    with pytest.raises(UnknownRequestError, match="closed"):
        handle.fork()
