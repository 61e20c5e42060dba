"""What the comparison of bytes notices, against a server that is made up."""

import asyncio

import pytest

from sglang_dsv4.check.compare.hit_bytes import check_bytes
from sglang_dsv4.check.reply import Reply, Token


class MadeUp:
    """Answers as a server would; ``digest`` makes a digest of the prompt and of how many tokens were cached."""

    def __init__(self, digest, has_cache=True):
        self._digest, self._has_cache = digest, has_cache
        self._pages, self._digests = set(), {}

    async def flush(self):
        self._pages.clear()

    async def generate(self, ids, new_tokens, rid):
        cached = 256 if self._has_cache and ids[:256] in self._pages else 0
        self._pages.add(ids[:256])
        self._digests[rid] = [len(ids), self._digest(ids, cached)]
        return Reply((Token(1),), cached_tokens=cached)

    async def plugin_facts(self):
        return {"digests": self._digests}


def faults_of(digest, **options):
    found = asyncio.run(check_bytes(MadeUp(digest, **options), (300, 513)))
    assert found["compared"] == 6
    return found["faults"]


def test_equal_digests_pass():
    assert faults_of(lambda ids, cached: hash(ids)) == []


@pytest.mark.parametrize(
    ("digest", "options", "named"),
    [
        (lambda ids, cached: hash((ids, cached)), {}, {"hit", "cousin's"}),
        (lambda ids, cached: 0, {}, {"twin"}),
        (lambda ids, cached: hash(ids), {"has_cache": False}, {"hit", "cousin's"}),
    ],
    ids=["a hit with other bytes", "a digest of nothing", "no hits"],
)
def test_what_is_wrong_is_named(digest, options, named):
    assert {fault.split(" ")[0] for fault in faults_of(digest, **options)} == named
