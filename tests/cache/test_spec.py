"""`CacheSpec.from_hf` for Flash, Pro and tiny configurations, and what it refuses."""

import json

import pytest
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from sglang_dsv4.cache.regions import Owner, RegionTable, history_bytes_per_token
from sglang_dsv4.cache.sizing import RELEASED
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.spec import CacheSpec
from tests.cache.driver import CONFIG

FLASH, PRO = RELEASED["flash"], RELEASED["pro"]


def kinds(spec):
    return {kind: sum(layer.kind == kind for layer in spec.layers) for kind in ("window", "csa", "hca")}


def test_layers_of_flash_and_pro():
    assert kinds(CacheSpec.from_hf(FLASH)) == {"window": 2, "csa": 21, "hca": 20}
    assert kinds(CacheSpec.from_hf(PRO)) == {"window": 0, "csa": 30, "hca": 31}


@pytest.mark.parametrize(
    ("config", "formats", "bytes_per_token"),
    [
        (FLASH, ("bf16", "bf16"), 6880),
        (FLASH, ("fp8_584", "fp8"), 3850.25),
        (PRO, ("bf16", "bf16"), 9848),
        (PRO, ("fp8_584", "fp8"), 5511.4375),
    ],
)
def test_bytes_per_token(config, formats, bytes_per_token):
    spec = CacheSpec.from_hf(config, row_format=formats[0], index_format=formats[1])
    assert history_bytes_per_token(spec) == bytes_per_token


def test_state_of_flash():
    """1.84 MB of streams a request; 20 KiB of boundary state per CSA layer and page, beside the window rows."""
    spec = CacheSpec.from_hf(FLASH, row_format="fp8_584", index_format="fp8")
    assert RegionTable(spec).bytes_of(Owner.STATE_SLOT) == 21 * 8 * 4 * (512 + 128) * 4 + 20 * 3 * 512 * 4 == 1_843_200
    assert RegionTable(spec).bytes_of(Owner.WINDOW_PAGE) == 43 * 256 * 584 + 21 * 20 * 1024


@pytest.mark.parametrize("config", [FLASH, PRO, CONFIG], ids=["flash", "pro", "tiny"])
def test_mapping_json_and_transformers_give_one_spec(config):
    mapping = CacheSpec.from_hf(config)
    assert CacheSpec.from_hf(json.loads(json.dumps(config))) == mapping
    given = {key: value for key, value in config.items() if key not in ("model_type", "compress_ratios")}
    names = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    layers = [names[r] for r in config["compress_ratios"][: config["num_hidden_layers"]]]
    assert CacheSpec.from_hf(DeepseekV4Config(**given, layer_types=layers)) == mapping


def test_digest_tells_specs_apart():
    spec = CacheSpec.from_hf(FLASH)
    assert spec.digest() == CacheSpec.from_hf(FLASH).digest()
    assert len({spec.digest(), CacheSpec.from_hf(PRO).digest(), CacheSpec.from_hf(FLASH, page_tokens=128).digest()}) == 3


def changed(**fields):
    return {**CONFIG, **fields}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (changed(compress_ratios=[0, 2, 128]), {}, r"compress_ratios\[1\] is 2: .*V4\.1"),
        (changed(compress_ratios=[0, 4, 1]), {}, r"compress_ratios\[2\] is 1: .*V4\.1"),
        (changed(compress_ratios=[0, 8, 128]), {}, r"compress_ratios\[1\]: expected 0, 4 or 128, got 8"),
        (changed(compress_ratios=[0]), {}, "expected at least 3 layers, got 1"),
        (changed(head_dim=128), {}, "head_dim: expected 512"),
        (changed(index_topk=None), {}, "config.index_topk: expected by DeepSeek-V4"),
        (changed(compress_ratios=[0, 4.5, 128]), {}, r"compress_ratios\[1\]: expected an integer, got 4.5"),
        (changed(compress_ratios=[0, None, 128]), {}, r"compress_ratios\[1\]: expected an integer, got None"),
        (changed(compress_ratios=[0, True, 128]), {}, r"compress_ratios\[1\]: expected an integer, got True"),
        (changed(compress_ratios=4), {}, "compress_ratios: expected a list, got 4"),
        (changed(compress_ratios=None, layer_types=3), {}, "layer_types: expected a list, got 3"),
        (changed(compress_ratios=None, layer_types=[[], 1, "x"]), {}, r"layer_types: expected .*, got \[\[\], 1, 'x'\]"),
        (changed(num_hidden_layers=-1), {}, "config.num_hidden_layers: expected an integer of 1 or more, got -1"),
        (CONFIG, {"num_layers": 0}, "num_layers: expected an integer of 1 or more, got 0"),
        (changed(index_topk=16.5), {}, "config.index_topk: expected an integer, got 16.5"),
        (changed(sliding_window="128"), {}, "config.sliding_window: expected an integer, got '128'"),
        (changed(head_dim=[512]), {}, r"config.head_dim: expected an integer, got \[512\]"),
        (CONFIG, {"page_tokens": 256.0}, "page_tokens: expected an integer, got 256.0"),
        (CONFIG, {"max_draft_tokens": 1.5}, "max_draft_tokens: expected an integer, got 1.5"),
        (changed(rope_theta=float("nan")), {}, "config.rope_theta: expected a finite number above 0, got nan"),
        (changed(compress_rope_theta="1e4"), {}, "config.compress_rope_theta: expected a finite number above 0, got '1e4'"),
        (changed(rope_scaling=4), {}, "config.rope_scaling: expected a mapping, got 4"),
        (changed(rope_scaling={"factor": 0}), {}, "rope scaling's factor: expected a finite number above 0, got 0"),
        (changed(rope_parameters={"main": 1}), {}, "config.rope_parameters.main: expected a mapping, got 1"),
        ({"model_type": "llama"}, {}, "model_type: expected a DeepSeek-V4 configuration, got 'llama'"),
        (CONFIG, {"row_format": "fp4"}, r"row_format: expected one of \['bf16', 'fp32', 'fp8_584'\], got 'fp4'"),
        (CONFIG, {"index_format": "fp4"}, "index_format: expected one of"),
    ],
)
def test_what_is_not_supported_is_named(config, options, message):
    with pytest.raises(UnsupportedError, match=message):
        CacheSpec.from_hf(config, **options)


@pytest.mark.parametrize(
    ("option", "value"), [("page_tokens", 64), ("page_tokens", 192), ("window", 0), ("max_draft_tokens", -1)]
)
def test_values_out_of_range(option, value):
    config = changed(sliding_window=value) if option == "window" else CONFIG
    options = {} if option == "window" else {option: value}
    with pytest.raises((ValueError, UnsupportedError), match=option):
        CacheSpec.from_hf(config, **options)
