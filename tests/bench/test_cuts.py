"""``bench cuts`` checks what it times, and counts what is copied."""

import json

import pytest

from sglang_dsv4.bench import cuts
from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.cli import main
from sglang_dsv4.errors import CacheInvariantError


def test_the_check_notices_a_fork_that_forgets_its_state(monkeypatch):
    cuts.check("bf16", "cpu", length=262)
    stock = CompressedKVCache.fork

    def fork(cache, request):
        twin = stock(cache, request)
        for state in cache.storage.stream_state:
            state[twin.state_slot] = 0
        return twin

    monkeypatch.setattr(CompressedKVCache, "fork", fork)
    with pytest.raises(CacheInvariantError, match="fork: expected the bytes of a cold run"):
        cuts.check("bf16", "cpu", length=262)


def test_bytes_copied_do_not_depend_on_the_length(tmp_path, monkeypatch, capsys):
    """At most the stream state, and with the first write one page."""
    monkeypatch.setattr(cuts, "FLASH_RATIOS", cuts.ONE_OF_EACH)
    assert main(["bench", "cuts", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["tokens"] for row in rows] == [1_000, 10_000, 100_000]
    for row in rows:
        assert row["fork_bytes"] == row["state_bytes"]
        assert 0 < row["first_write_bytes"] <= row["page_bytes"]
    assert "fork, us" in capsys.readouterr().out
