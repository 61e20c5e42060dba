"""Sizes that are computed are those that are allocated."""

import json

import pytest

from sglang_dsv4.cache import ExternalKVCache
from sglang_dsv4.cache.sizing import ServerSize, bytes_by_pool, most_tokens, released_spec, size_of
from sglang_dsv4.cli import main
from sglang_dsv4.errors import UnsupportedError
from tests.cache.driver import CONFIG, FORMATS, make_spec


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
@pytest.mark.parametrize("tokens", [256, 1280, 4096])
def test_bytes_are_those_of_a_cache(formats, tokens):
    spec = make_spec(formats)
    capacity = ServerSize(tokens, 3, 0.5, context_tokens=2048).capacity(spec.page_tokens)
    found = ExternalKVCache(spec, capacity).report().bytes_by_pool
    computed = bytes_by_pool(spec, capacity)
    assert computed == {name: size for name, size in found.items() if name in computed}
    assert sum(computed.values()) == sum(found.values())


@pytest.mark.parametrize("model", ["flash", "pro"])
@pytest.mark.parametrize("memory", [3 * 10**9, 80 << 30])
def test_the_most_tokens_fit_and_a_page_more_does_not(model, memory):
    spec = released_spec(model, row_format="fp8_584", index_format="fp8")
    tokens = most_tokens(spec, memory, 64, 0.1)
    assert tokens % 256 == 0 < tokens
    assert size_of(spec, ServerSize(tokens, 64, 0.1)) <= memory
    assert size_of(spec, ServerSize(tokens + 256, 64, 0.1)) > memory


def test_too_little_memory_has_room_for_nothing(capsys):
    assert most_tokens(released_spec("flash"), 10**6, 64, 0.1) == 0
    assert main(["size", "flash", "--memory", "0.001"]) == 1
    assert "--memory 0.001: expected room for 64 requests" in capsys.readouterr().err


def test_the_command_reads_a_configuration(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert main(["size", str(tmp_path), "--memory", "1", "--dsv4-kv-format", "fp8_584"]) == 0
    spec = make_spec(("fp8_584", "fp8"))
    tokens = most_tokens(spec, 1 << 30, 64, 0.1)
    assert f"--max-total-tokens {tokens}" in capsys.readouterr().out
    assert main(["size", str(tmp_path / "none"), "--memory", "1"]) == 1
    with pytest.raises(UnsupportedError, match="model: expected one of"):
        released_spec("v5")
