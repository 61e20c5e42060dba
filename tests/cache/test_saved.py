"""Sequences on disk: exact, deduplicated, whole or not there, and checked before anything changes."""

import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sglang_dsv4.cache import CompressedKVCache
from sglang_dsv4.cache.persist import format as saved_module
from sglang_dsv4.cache.persist import manifest
from sglang_dsv4.cache.persist.rows import Transfer, shapes_of
from sglang_dsv4.cache.regions import Owner
from sglang_dsv4.errors import OutOfPagesError, SavedFileError, StalePlanError
from tests.cache.driver import FORMATS, append, make_spec, reachable_bytes
from tests.cache.test_branching import DRAFT, Words, make_cache, words

LENGTHS = [0, 1, 3, 4, 5, 126, 127, 128, 129, 255, 256, 257, 383, 517]
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[("bf16", "bf16"), ("fp8_584", "fp8"), ("fp32", "fp32")], ids="-".join)
def cache(request):
    return make_cache(request.param)


def blobs(folder):
    return sorted((folder / saved_module.BLOB_FOLDER).glob("*.safetensors"))


def counts(cache):
    return cache.requests.allocator.counts(), cache.requests.epoch, len(cache.requests.opened)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_loaded_sequence_continues_exactly(cache, tmp_path, length):
    text = Words(cache.spec)
    request = cache.open()
    tokens = text.append(cache, request, [], words(length)) if length else []
    cache.save(request, tmp_path / "a.dsv4kv", {"tokens": json.dumps(tokens)})
    cache.close(request)
    again = cache.load(tmp_path / "a.dsv4kv")
    extra = again.extra
    assert json.loads(extra["tokens"]) == tokens
    cache.check_integrity(memory=True)
    tokens = text.append(cache, again, tokens, words(3, 1))
    tokens = text.append(cache, again, tokens, words(140, 2))
    assert reachable_bytes(cache, again) == text.expected(cache, tokens)


@pytest.mark.parametrize("back", range(DRAFT + 1))
def test_a_loaded_sequence_can_still_be_rolled_back(cache, tmp_path, back):
    text = Words(cache.spec)
    request = cache.open()
    tokens = text.append(cache, request, [], words(131))
    cache.save(request, tmp_path / "a.dsv4kv")
    other = make_cache_like(cache)
    again = other.load(tmp_path / "a.dsv4kv")
    other.truncate(again, 131 - back)
    tokens = text.append(other, again, tokens[: 131 - back], words(130, 3))
    assert reachable_bytes(other, again) == text.expected(other, tokens)


def make_cache_like(cache):
    return make_cache((cache.spec.row_format, cache.spec.index_format))


def test_another_process_loads_the_same_bytes(tmp_path):
    cache = make_cache()
    text = Words(cache.spec)
    request = cache.open()
    text.append(cache, request, [], words(300))
    cache.save(request, tmp_path / "a.dsv4kv")
    script = (
        "import sys, hashlib\n"
        "from tests.cache.test_branching import make_cache\n"
        "from tests.cache.driver import reachable_bytes\n"
        "cache = make_cache()\n"
        "found = reachable_bytes(cache, cache.load(sys.argv[1]))\n"
        "print(hashlib.sha256(b''.join(found[key] for key in sorted(found))).hexdigest())\n"
    )
    found = reachable_bytes(cache, request)
    expected = hashlib.sha256(b"".join(found[key] for key in sorted(found))).hexdigest()
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.dsv4kv")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert run.stdout.strip() == expected, run.stderr[-2000:]


def test_ten_branches_store_their_common_pages_once(tmp_path):
    cache = make_cache(num_pages=30, max_requests=12)
    text = Words(cache.spec)
    trunk = cache.open()
    tokens = text.append(cache, trunk, [], words(640))  # five full pages
    for branch in range(10):
        twin = cache.fork(trunk)
        text.append(cache, twin, tokens, words(20, branch))
        cache.save(twin, tmp_path / f"{branch}.dsv4kv")
        cache.close(twin)
    # Five common history pages and one common window page, then per branch: a history page, a window page, the state.
    assert len(blobs(tmp_path)) <= 5 + 2 + 10 * 3
    before = len(blobs(tmp_path))
    cache.save(trunk, tmp_path / "trunk.dsv4kv")
    assert len(blobs(tmp_path)) - before <= 3  # its history is there; its two window pages and its state are not


def test_ten_branches_of_10000_tokens_take_little_more_than_one(tmp_path):
    """Less than 1.2 times one branch, plus the pages and the state that are each branch's own."""
    cache = make_cache(num_pages=100, max_requests=12)
    text = Words(cache.spec)
    trunk, tokens = cache.open(), []
    for _ in range(5):
        tokens = text.append(cache, trunk, tokens, words(2000))
    sizes, own = [], []
    for branch in range(10):
        twin = cache.fork(trunk)
        text.append(cache, twin, tokens, words(30, branch))
        before = {blob.name for blob in blobs(tmp_path)} if branch else set()
        cache.save(twin, tmp_path / f"{branch}.dsv4kv")
        sizes.append(sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()))
        new = [blob for blob in blobs(tmp_path) if blob.name not in before]
        own.append(sum(blob.stat().st_size for blob in new))
        cache.close(twin)
    assert sizes[-1] < 1.2 * (sizes[0] + sum(own[1:]))
    # What is a branch's own: its last history page, the window pages it reaches, and its state, of 79 history pages.
    pages = cache.report().history_page_bytes + 2 * cache.report().window_page_bytes
    assert max(own[1:]) < pages + cache.report().stream_bytes_per_request + 64 * 1024


def test_nothing_of_another_request_is_saved(tmp_path):
    """The same sequence gives the same blobs, whatever its slot and pages held before."""
    names = []
    for salt in (0, 1):
        cache = make_cache()
        text = Words(cache.spec)
        earlier = cache.open()
        text.append(cache, earlier, [], words(300 + 31 * salt, salt))
        cache.close(earlier)
        request = cache.open()
        text.append(cache, request, [], words(130, 5))
        folder = tmp_path / str(salt)
        folder.mkdir()
        cache.save(request, folder / "a.dsv4kv")
        names.append([blob.name for blob in blobs(folder)])
    assert names[0] == names[1]


@pytest.fixture
def kept(tmp_path):
    """A cache, a saved sequence of 300 tokens, and where it is."""
    cache = make_cache()
    request = cache.open()
    Words(cache.spec).append(cache, request, [], words(300))
    cache.save(request, tmp_path / "a.dsv4kv")
    return cache, request, tmp_path / "a.dsv4kv"


def edit(path, **fields):
    """Change a manifest and sign it again."""
    body = json.loads(path.read_text())
    body.update(fields)
    body.pop("checksum")
    path.write_text(json.dumps({**body, "checksum": manifest._checksum(body)}))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "no file": (lambda p: p.unlink(), "expected a saved sequence, found no such file"),
    "cut manifest": (lambda p: p.write_text(p.read_text()[:200]), "damaged, it cannot be read as JSON"),
    "other json": (lambda p: p.write_text("[1]"), "expected a sglang-dsv4 saved sequence, got something else"),
    "changed manifest": (
        lambda p: p.write_text(p.read_text().replace('"seq_len": 300', '"seq_len": 301')),
        "damaged, its checksum does not match",
    ),
    "newer version": (lambda p: edit(p, version=3), "expected format version 2, got 3"),
    "page counts": (
        lambda p: edit(p, seq_len=600, min_len=595),
        "expected 5 history and window pages for 600 tokens, got 3 and 3",
    ),
    "no field": (lambda p: edit(p, window=None), "expected names of pages, got None"),
    "no number": (lambda p: edit(p, seq_len="300"), "seq_len: expected a number of tokens, got '300'"),
    "a path": (lambda p: edit(p, state="../a"), "expected the name of a page, got '../a'"),
    "cut too far": (lambda p: edit(p, min_len=294), "cut back by at most 5 tokens, got one of 300"),
    "not cut at all": (lambda p: edit(p, min_len=301), "got one of 300 tokens with min_len 301"),
    "another page": (
        lambda p: edit(p, history=(h := json.loads(p.read_text())["history"])[:2] + h[:1]),
        r"tensor layer.1.entry.main: expected \(\(11, 1024\).*got \(\(32, 1024\)",
    ),
    "another state": (
        lambda p: edit(p, state=json.loads(p.read_text())["history"][0]),
        "tensor layer.1.entry.main: expected none, got",
    ),
    "missing page": (lambda p: blobs(p.parent)[1].unlink(), "expected a page, found no such file"),
    "cut page": (lambda p: blobs(p.parent)[1].write_bytes(blobs(p.parent)[1].read_bytes()[:50]), "is damaged"),
    "flipped bit": (lambda p: flip(blobs(p.parent)[2], -3), "is damaged: tensor layer"),
    "flipped header": (lambda p: flip(blobs(p.parent)[2], 20), "is damaged"),
}


def test_what_is_not_damaged_loads(kept):
    """The twin of the next test: signing again is not what makes a manifest bad."""
    cache, request, path = kept
    edit(path, extra={"a": "b"})
    again = cache.load(path)
    extra = again.extra
    assert extra == {"a": "b"}
    assert reachable_bytes(cache, again) == reachable_bytes(cache, request)


def test_a_manifest_without_a_field(kept):
    cache, _, path = kept
    body = json.loads(path.read_text())
    del body["tensors"], body["checksum"]
    path.write_text(json.dumps({**body, "checksum": manifest._checksum(body)}))
    with pytest.raises(SavedFileError, match="expected a field 'tensors', found none"):
        cache.load(path)


def test_each_page_is_read_once(kept, monkeypatch):
    cache, _, path = kept
    stock, read = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda p: (read.append(p.name), stock(p))[1])
    cache.load(path)
    assert sorted(read) == sorted([path.name, *(blob.name for blob in blobs(path.parent))])


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
@pytest.mark.parametrize("length", [0, 1, 5, 127, 128, 129, 256, 259])
def test_the_shapes_checked_are_those_saved(formats, length):
    for draft in (0, DRAFT):
        cache = make_cache(formats, draft=draft)
        request = cache.open()
        if length:
            Words(cache.spec).append(cache, request, [], words(length))
        table = cache.storage.table
        transfer = Transfer(table, cache.storage.layers)
        pieces = [(Owner.STATE_SLOT, 0)]
        for index, page in enumerate(request.pages.window):
            pieces += [(Owner.HISTORY_PAGE, index), (Owner.WINDOW_PAGE, index)][: 1 + (page >= 0)]
        for owner, index in pieces:
            tensors, shapes = transfer.read(request, owner, index), shapes_of(table, owner, length, request.min_len, index)
            assert {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()} == shapes


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_one_sentence_and_changes_nothing(kept, damage):
    cache, _, path = kept
    spoil, message = DAMAGES[damage]
    spoil(path)
    before = counts(cache)
    with pytest.raises(SavedFileError, match=message) as caught:
        cache.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert counts(cache) == before
    cache.check_integrity()
    for file in path.parent.rglob("*"):
        assert not file.name.startswith(saved_module.TEMPORARY_PREFIX)


def test_another_spec_is_named(kept):
    _, _, path = kept
    other = CompressedKVCache(make_spec(page_tokens=256, max_draft_tokens=DRAFT), num_pages=4, max_requests=1)
    with pytest.raises(SavedFileError, match="of another spec: page_tokens: expected 256, got 128"):
        other.load(path)
    other = make_cache(("fp8_584", "fp8"))
    with pytest.raises(SavedFileError, match="of another spec: row_format: expected 'fp8_584', got 'bf16'"):
        other.load(path)


def test_no_room_changes_nothing(kept):
    _, _, path = kept
    small = make_cache(num_pages=2)
    before = counts(small)
    with pytest.raises(OutOfPagesError, match="history pages: expected 3 free, got 2 of 2"):
        small.load(path)
    assert counts(small) == before


def test_a_full_disk_leaves_nothing_behind(kept, tmp_path, monkeypatch):
    """The disk fills at each file in turn, half way through it; the last failure is after the manifest is in place."""
    cache, request, _ = kept
    stock = os.fsync
    for full_after in itertools.count():
        folder = tmp_path / f"full{full_after}"
        folder.mkdir()
        written = []

        def fill(descriptor, written=written, full_after=full_after):
            written.append(descriptor)
            if len(written) > full_after:
                raise OSError(errno.ENOSPC, "No space left on device")
            stock(descriptor)

        monkeypatch.setattr(saved_module.os, "fsync", fill)
        with pytest.raises(SavedFileError, match="No space left on device") as caught:
            cache.save(request, folder / "b.dsv4kv")
        monkeypatch.undo()
        if "saved, but it may not survive" in str(caught.value):
            break
        assert "cannot be written, nothing was saved" in str(caught.value)
        assert [p for p in folder.rglob("*") if p.is_file()] == []
    assert full_after > 7  # three history pages, two window pages, the state, the folder, the manifest
    again = cache.load(folder / "b.dsv4kv")
    assert reachable_bytes(cache, again) == reachable_bytes(cache, request)


def test_a_damaged_page_is_mended_by_the_next_save(kept):
    cache, request, path = kept
    for blob in blobs(path.parent):
        blob.write_bytes(blob.read_bytes()[:50])
    cache.save(request, path)
    again = cache.load(path)
    assert reachable_bytes(cache, again) == reachable_bytes(cache, request)


def test_saves_at_the_same_time_do_not_harm_each_other(kept, tmp_path):
    cache, request, _ = kept
    paths = [tmp_path / f"{i}.dsv4kv" for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: cache.save(request, path), paths))
    for path in paths:
        again = cache.load(path)
        assert reachable_bytes(cache, again) == reachable_bytes(cache, request)
        cache.close(again)


def test_a_failed_save_keeps_what_was_saved_before(kept, monkeypatch):
    cache, request, path = kept
    before = path.read_text(), [b.name for b in blobs(path.parent)]
    Words(cache.spec).append(cache, request, words(300), words(40, 1))

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saved_module.os, "fsync", fail)
    with pytest.raises(SavedFileError):
        cache.save(request, path)
    assert (path.read_text(), [b.name for b in blobs(path.parent)]) == before


def test_an_unsettled_request_is_not_saved(tmp_path):
    cache = make_cache()
    request = cache.open()
    given = Words(cache.spec).inputs(words(4))
    append(cache, 0, cache.plan([(request, 4)]), window=given.cut(0, "window", 0, 4))
    with pytest.raises(StalePlanError):
        cache.save(request, tmp_path / "a.dsv4kv")
    assert list(tmp_path.iterdir()) == []
