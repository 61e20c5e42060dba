"""Flags, variables, and how one becomes the other."""

import argparse

import pytest

from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install import options


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in (env.COMPRESSED_KV, env.KV_FORMAT, env.INDEX_FORMAT, env.ATTENTION, env.CHECK, env.CHECK_DUMPS):
        monkeypatch.setenv(name, "")


def parse(*flags):
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return parser.parse_args(flags)


def test_off_by_default():
    options.publish(parse())
    assert not options.is_enabled()
    assert env.get(env.COMPRESSED_KV) is None


def test_the_flag_becomes_the_variable():
    options.publish(parse("--enable-dsv4-compressed-kv", "--dsv4-kv-format", "fp8_584"))
    assert options.is_enabled()
    assert options.read() == options.Options("fp8_584", "fp8")


def test_formats_may_be_mixed():
    options.publish(parse("--enable-dsv4-compressed-kv", "--dsv4-kv-format", "fp8_584", "--dsv4-index-format", "bf16"))
    assert options.read() == options.Options("fp8_584", "bf16")


def test_the_attention_is_carried_and_is_no_field_of_the_spec():
    options.publish(parse("--enable-dsv4-compressed-kv", "--dsv4-attention", "eager"))
    assert options.read() == options.Options("bf16", "bf16", "eager")
    assert options.read().formats() == {"row_format": "bf16", "index_format": "bf16"}


def test_a_format_without_the_flag_is_refused():
    with pytest.raises(UnsupportedError, match="expected together with --enable-dsv4-compressed-kv"):
        options.publish(parse("--dsv4-kv-format", "bf16"))


@pytest.mark.parametrize("value", ["yess", "2", "enable"])
def test_a_misspelt_switch_is_not_off(monkeypatch, value):
    monkeypatch.setenv(env.COMPRESSED_KV, value)
    with pytest.raises(ValueError, match=f"{env.COMPRESSED_KV}: expected 1 or 0, got '{value}'"):
        options.is_enabled()


def test_a_misspelt_format_is_named(monkeypatch):
    monkeypatch.setenv(env.KV_FORMAT, "fp8")
    with pytest.raises(UnsupportedError, match=rf"--dsv4-kv-format \({env.KV_FORMAT}\): expected one of .*, got 'fp8'"):
        options.read()


def test_the_level_of_checks_is_carried():
    flags = ("--dsv4-check", "step", "--dsv4-check-dumps", "/dumps")
    options.publish(parse("--enable-dsv4-compressed-kv", *flags))
    assert (options.read().check, options.read().dumps) == ("step", "/dumps")


def test_an_unknown_level_of_checks_is_refused():
    options.publish(parse("--enable-dsv4-compressed-kv", "--dsv4-check", "always"))
    with pytest.raises(UnsupportedError, match=r"expected one of \['off', 'boundary', 'step'\], got 'always'"):
        options.read()
