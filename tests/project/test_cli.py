"""The command line says what every option does, and ends in a sentence."""

import argparse
import importlib

import pytest

from sglang_dsv4 import cli


def options(parser):
    """Every option and argument, of the commands below it too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options(below)
        else:
            yield action


def without_help(parser):
    return [action.dest for action in options(parser) if not action.help]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_has_help(name):
    module, _ = cli.COMMANDS[name]
    parser = argparse.ArgumentParser()
    importlib.import_module(module).add_parser(parser.add_subparsers())
    assert without_help(parser) == []
    parser.add_argument("--mute")
    assert without_help(parser) == ["mute"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["size", "flash", "--memory", "nan"], "--memory: expected a number of GiB above 0, got nan"),
        (["size", "flash", "--memory", "-1"], "--memory: expected a number of GiB above 0, got -1.0"),
        (["size", "flash", "--memory", "9", "--requests", "0"], "--requests: expected 1 or more, got 0"),
        (["size", "pro", "--memory", "9", "--swa-full-tokens-ratio", "7"], "at most 1, got 7.0"),
        (["size", "{folder}", "--memory", "9"], "config.json: expected JSON, got Expecting value"),
        (["inspect", "{folder}"], "expected an sglang-dsv4 integrity dump, found a folder"),
        (
            ["inspect", "{folder}/config.json"],
            "expected an sglang-dsv4 integrity dump, got something that cannot be read: Error",
        ),
        (["prune", "{folder}"], "expected a folder with dsv4kv-pages, found none"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_done_is_one_sentence(argv, sentence, tmp_path, capsys):
    (tmp_path / "config.json").write_text("no JSON")
    assert cli.main([part.format(folder=tmp_path) for part in argv]) == 1
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith(f"sglang_dsv4 {argv[0]}: ")
    assert sentence in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize("what", [["kernels"], ["attention"], ["cuts", "--device", "cuda"]])
def test_a_benchmark_of_a_gpu_says_that_there_is_none(what, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["bench", *what]) == 1
    assert f"{what[0]}: expected a CUDA device, found none" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sglang_dsv4.cache.sizing_command.most_tokens", interrupted)
    assert cli.main(["size", "flash", "--memory", "9"]) == 130
    assert capsys.readouterr().err == "Stopped.\n"
