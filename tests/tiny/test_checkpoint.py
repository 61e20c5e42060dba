"""The files: what is written, what is refused, what is the same again."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sglang_dsv4.tiny import SHAPES, TinySpec, add_parser, holds_checkpoint, write_tiny_checkpoint
from sglang_dsv4.tiny.checkpoint import MANIFEST, WEIGHTS
from sglang_dsv4.tiny.weights import draw_weights

SMALL = TinySpec(compress_ratios=(0, 4), num_experts=2, moe_width=16, num_hash_layers=1)


def make_tiny(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["make-tiny", *arguments])
    return args.func(args)


def test_equal_specs_give_equal_files(tmp_path: Path):
    for name in ("first", "second"):
        write_tiny_checkpoint(tmp_path / name, SMALL)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_another_seed_gives_other_weights():
    first, second = draw_weights(SMALL), draw_weights(replace(SMALL, seed=1))
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same == {name for name in first if name.endswith("_scale")}


def test_dtypes_are_those_of_the_released_checkpoints(checkpoint: Path):
    singles = ("hc_", "attn_sink", ".ape", "gate.bias")
    for name, tensor in load_file(checkpoint / WEIGHTS).items():
        if name.endswith("tid2eid"):
            expected = torch.int64
        elif any(part in name for part in singles):
            expected = torch.float32
        else:
            expected = torch.bfloat16
        assert tensor.dtype is expected, name


def test_hash_routing_names_distinct_experts(checkpoint: Path):
    table = load_file(checkpoint / WEIGHTS)["layers.0.ffn.gate.tid2eid"]
    assert table.min() >= 0 and table.max() < TinySpec().num_experts
    assert (table[:, 0] != table[:, 1]).all()


def test_index_lists_every_tensor(checkpoint: Path):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load_file(checkpoint / WEIGHTS))


def test_an_earlier_checkpoint_is_overwritten(tmp_path: Path):
    write_tiny_checkpoint(tmp_path, SMALL)
    changed = replace(SMALL, seed=7)
    assert not holds_checkpoint(tmp_path, changed)
    write_tiny_checkpoint(tmp_path, changed)
    assert holds_checkpoint(tmp_path, changed)
    assert not holds_checkpoint(tmp_path, SMALL)


def test_an_interrupted_run_is_not_taken_for_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tiny_checkpoint(tmp_path, SMALL)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sglang_dsv4.tiny.checkpoint.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tiny_checkpoint(tmp_path, SMALL)
    assert not holds_checkpoint(tmp_path, SMALL)
    monkeypatch.undo()
    write_tiny_checkpoint(tmp_path, SMALL)
    assert holds_checkpoint(tmp_path, SMALL)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        write_tiny_checkpoint(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        write_tiny_checkpoint(tmp_path / "file", SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress_ratios": ()}, "at least one layer"),
        ({"compress_ratios": (0, 2)}, r"compress_ratios\[1\]: .* got 2"),
        ({"num_heads": 8, "o_groups": 3}, "o_groups"),
        ({"experts_per_token": 3}, "experts_per_token"),
        ({"num_hash_layers": 3}, "num_hash_layers"),
        ({"index_topk": 0}, "index_topk"),
    ],
)
def test_an_impossible_shape_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_command_writes_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "tiny"
    assert make_tiny(str(target), "--seed", "3", "--layers", "4,128", "--index-topk", "16") == 0
    assert "ratios 4, 128" in capsys.readouterr().out
    config = json.loads((target / "config.json").read_text())
    assert (config["compress_ratios"], config["index_topk"], config["num_hidden_layers"]) == ([4, 128], 16, 2)
    assert json.loads((target / MANIFEST).read_text())["spec"]["seed"] == 3


def test_command_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "thesis.txt").write_text("precious")
    assert make_tiny(str(tmp_path)) == 1
    assert make_tiny(str(tmp_path / "new"), "--layers", "0,3") == 1
    assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(SystemExit):
        make_tiny(str(tmp_path / "new"), "--layers", "four")


def test_the_flash_shape_has_the_widths_of_flash():
    config = TinySpec(**SHAPES["flash"]).config()
    released = {
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "num_experts_per_tok": 6,
        "sliding_window": 128,
    }
    assert {name: config[name] for name in released} == released
    assert config["max_position_embeddings"] > 128 * 1024
    # The twin: the tiny shape has not.
    assert TinySpec().config()["hidden_size"] != 4096


def test_the_command_writes_a_shape(tmp_path: Path):
    assert make_tiny(str(tmp_path / "new"), "--layers", "0", "--shape", "heads64") == 0
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["num_attention_heads"], config["index_n_heads"], config["o_groups"]) == (64, 64, 8)
