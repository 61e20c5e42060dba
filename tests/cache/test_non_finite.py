"""One rule for all row formats: an input that is no number makes rows that are none, and integrity says so."""

from dataclasses import replace

import pytest

from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.errors import CacheInvariantError
from tests.cache.driver import FORMATS, TokenInputs, feed, make_spec, random_sequence

PARTS = [(0, "window"), (1, "main"), (1, "index"), (2, "main")]


def fed(spec, sequence):
    cache = CompressedKVCache(spec, num_pages=1, max_requests=1)
    feed(cache, [(cache.open(), sequence, 200)])
    return cache


def spoilt(sequence, layer_id, part, value):
    """The same inputs, but for the first channel of one token that no stream row keeps."""
    given = sequence.parts[layer_id][part]
    values = given.values.clone()
    # The kv channels that are pooled into the token's own block: CSA rows begin with those of the next.
    token, channel = 150 if part == "window" else 100, values.shape[1] // 4 if layer_id == 1 else 0
    values[token, channel] = float(value)
    layers = [dict(parts) for parts in sequence.parts]
    layers[layer_id][part] = replace(given, **{"kv" if part == "window" else "kv_score": values})
    return TokenInputs(tuple(layers))


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
@pytest.mark.parametrize(("layer_id", "part"), PARTS)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_it_is_noticed(formats, layer_id, part, value):
    spec = make_spec(formats)
    sequence = random_sequence(spec, 200)
    cache = fed(spec, spoilt(sequence, layer_id, part, value))
    with pytest.raises(CacheInvariantError, match="I6 rows"):
        cache.check_integrity(memory=True)
    fed(spec, sequence).check_integrity(memory=True)
