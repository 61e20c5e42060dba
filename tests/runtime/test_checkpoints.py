"""What is no DeepSeek-V4 checkpoint is refused with one sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_dsv4.errors import UnsupportedError
from tests.runtime.worlds import make_runtime


@pytest.fixture
def copy(small_checkpoint, tmp_path):
    return shutil.copytree(small_checkpoint, tmp_path / "copy")


def set_config(path, **values):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


def refusal(path, error=UnsupportedError, **options):
    with pytest.raises(error) as caught:
        make_runtime(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_such_folder(tmp_path):
    assert "nothing: expected a folder with a config.json, or a name" in refusal(tmp_path / "nothing")


def test_another_model(copy):
    set_config(copy, model_type="llama", architectures=["LlamaForCausalLM"])
    assert refusal(copy) == f"{copy}: expected model_type 'deepseek_v4', got 'llama'"


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").unlink()
    assert "expected the weights of a DeepSeek-V4 model" in refusal(copy)


def test_a_missing_tensor(copy):
    """transformers would draw it at random."""
    tensors = load_file(copy / "model.safetensors")
    del tensors["layers.1.attn.compressor.ape"]
    save_file(tensors, str(copy / "model.safetensors"), metadata={"format": "pt"})
    assert "missing_keys: ['model.layers.1.self_attn.compressor.position_bias']" in refusal(copy)


def test_a_geometry_that_is_not_implemented(copy):
    set_config(copy, sliding_window=512)
    assert "window: expected 1 .. page_tokens=128, got 512" in refusal(copy, ValueError)


def test_wrong_options(small_checkpoint):
    assert "dtype: expected one of" in refusal(small_checkpoint, ValueError, dtype=torch.float16)
    assert "chunk_tokens: expected 1 or more, got 0" in refusal(small_checkpoint, ValueError, chunk_tokens=0)
    assert "row_format: expected one of" in refusal(small_checkpoint, row_format="int4")
    with pytest.raises(TypeError, match="page_size"):
        make_runtime(small_checkpoint, page_size=4)


def test_without_a_tokenizer(copy):
    """Ids go in, and a text that is asked for says what is missing."""
    (copy / "tokenizer.json").unlink()
    runtime = make_runtime(copy)
    with pytest.raises(UnsupportedError, match="the checkpoint has no tokenizer.json"):
        runtime.open("text")
    handle = runtime.open([70, 71])
    assert handle.text == " 70 71" and handle.generate(1, stop=()).text.startswith(" ")


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "expected at least one token, got none"),
        ([], ValueError, "expected at least one token, got none"),
        ([5, 264], ValueError, "expected ids of 0 .. 263, got 264"),
        ([-1], ValueError, "expected ids of 0 .. 263, got -1"),
        ([1.5], TypeError, "token ids: expected integers, got 1.5"),
        ([5, True], TypeError, "token ids: expected integers, got True"),
    ],
)
def test_wrong_prompts(small_checkpoint, prompt, error, message):
    runtime = make_runtime(small_checkpoint)
    for action in (runtime.open, lambda given: runtime.generate([given], 1)):
        with pytest.raises(error, match=message):
            action(prompt)
    with pytest.raises(ValueError, match="max_new_tokens: expected 0 or more, got -1"):
        runtime.generate([[5]], -1)
