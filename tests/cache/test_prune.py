"""Pages of saved sequences go when no manifest names them, and no earlier."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from sglang_dsv4.cache import prune_saved
from sglang_dsv4.cli import main
from sglang_dsv4.errors import SavedFileError
from tests.cache.driver import reachable_bytes
from tests.cache.test_branching import Words, make_cache, words
from tests.cache.test_saved import blobs, edit


@pytest.fixture
def branches(tmp_path):
    """A cache, three branches of one history, and where they are saved."""
    cache = make_cache()
    text = Words(cache.spec)
    trunk = cache.open()
    tokens = text.append(cache, trunk, [], words(300))
    found = {}
    for name in "abc":
        found[name] = cache.fork(trunk)
        text.append(cache, found[name], tokens, words(9, ord(name)))
        cache.save(found[name], tmp_path / name)
    return cache, found, tmp_path


def loads(cache, request, path):
    again = cache.load(path)
    same = reachable_bytes(cache, again) == reachable_bytes(cache, request)
    cache.close(again)
    return same


def test_only_what_nobody_names_goes(branches):
    cache, requests, folder = branches
    before = blobs(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "other.json").write_text('{"format": "another", "of": "sglang-dsv4 saved sequence"}')
    (folder / "dsv4kv-pages" / "notes.txt").write_text("mine")
    found = prune_saved(folder)
    assert (found.sequences, found.kept_files, found.removed_files) == (3, len(before), 0)
    (folder / "b").unlink()
    tried = prune_saved(folder, dry_run=True)
    assert blobs(folder) == before
    found = prune_saved(folder)
    assert found == tried
    # A branch's own: its last history page, two window pages of which one is common, its state.
    assert (found.sequences, found.removed_files) == (2, 3)
    assert found.removed_bytes + found.kept_bytes == tried.removed_bytes + tried.kept_bytes
    assert found.kept_bytes == sum(blob.stat().st_size for blob in blobs(folder))
    assert all(loads(cache, requests[name], folder / name) for name in "ac")
    assert (folder / "notes.txt").exists() and (folder / "dsv4kv-pages" / "notes.txt").exists()
    for name in "ac":
        (folder / name).unlink()
    prune_saved(folder)
    assert blobs(folder) == []


def test_what_an_overwritten_sequence_left_goes(branches):
    cache, requests, folder = branches
    cache.save(requests["a"], folder / "b")
    cache.save(requests["a"], folder / "c")
    assert prune_saved(folder).removed_files == 6
    assert all(loads(cache, requests["a"], folder / name) for name in "abc")


def test_the_remains_of_a_killed_save_go(branches):
    cache, requests, folder = branches
    for place in (folder, folder / "dsv4kv-pages"):
        (place / ".dsv4kv-x1.tmp").write_bytes(b"half")
    found = prune_saved(folder)
    assert (found.removed_files, found.removed_bytes) == (2, 8)
    assert list(folder.rglob(".dsv4kv-*")) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.write_text(p.read_text()[:2000]), "damaged.*; it cannot be told"),
        (lambda p: p.rename(p.with_suffix(".dsv4kv")).write_text(""), "damaged.*; it cannot be told"),
        (lambda p: edit(p, version=3), "expected format version 2, got 3.*nothing was removed"),
    ],
)
def test_a_manifest_that_cannot_be_read_keeps_everything(branches, spoil, message):
    _, _, folder = branches
    (folder / "a").unlink()
    before = blobs(folder)
    spoil(folder / "b")
    with pytest.raises(SavedFileError, match=message):
        prune_saved(folder)
    assert blobs(folder) == before


def test_a_folder_without_pages(tmp_path):
    with pytest.raises(SavedFileError, match="expected a folder with dsv4kv-pages, found none"):
        prune_saved(tmp_path)


def test_saves_and_prunes_at_the_same_time(branches):
    """A page that is written, or found there, before its manifest is in place is not taken away."""
    cache, requests, folder = branches
    with ThreadPoolExecutor(3) as pool:
        prunes = [pool.submit(lambda: [prune_saved(folder) for _ in range(30)])]
        for turn in range(10):
            for name in "abc":
                pool.submit(cache.save, requests["abc"[turn % 3]], folder / name).result()
        prunes[0].result()
    assert all(loads(cache, requests["a"], folder / name) for name in "abc")


def test_the_command(branches, capsys):
    _, _, folder = branches
    (folder / "a").unlink()
    assert main(["prune", str(folder), "--dry-run"]) == 0
    assert "2 sequences need" in (shown := capsys.readouterr().out) and "would remove 3 files" in shown
    assert main(["prune", str(folder)]) == 0
    assert "removed 3 files" in capsys.readouterr().out
    shutil.rmtree(folder / "dsv4kv-pages")
    assert main(["prune", str(folder)]) == 1
    assert "sglang_dsv4 prune: " in capsys.readouterr().err
