"""Files that nobody would write by accident: one short sentence at once, and nothing changes, hangs or is lost."""

import hashlib
import json
import os
import struct

import pytest

from sglang_dsv4.cache import prune_saved
from sglang_dsv4.cache.inspect.dump import KIND, read_dump
from sglang_dsv4.cache.persist import format as saved_module
from sglang_dsv4.cli import main
from sglang_dsv4.errors import SavedFileError
from tests.cache.test_branching import Words, make_cache, words
from tests.cache.test_saved import blobs, counts, edit

DEEP = "[" * 100_000 + "]" * 100_000
LONGEST_MESSAGE = 800  # with two paths in it


@pytest.fixture
def kept(tmp_path):
    """A cache with one open request, and where a sequence of 300 tokens is saved."""
    cache = make_cache()
    request = cache.open()
    Words(cache.spec).append(cache, request, [], words(300))
    cache.save(request, tmp_path / "a.dsv4kv", {"name": "a"})
    return cache, tmp_path / "a.dsv4kv"


def replaced(path, make):
    path.unlink()
    make(path)


def deepened(path):
    """Deep enough that Python's parser gives up."""
    path.write_text(path.read_text().replace('"name": "a"', f'"name": {DEEP}'))


def page_of(path, header, data):
    """Replace the state by a safetensors file of this header, named by its bytes as the manifest wants it."""
    encoded = json.dumps(header).encode()
    content = struct.pack("<Q", len(encoded)) + encoded + data
    name = hashlib.sha256(content).hexdigest()
    (path.parent / saved_module.BLOB_FOLDER / f"{name}.safetensors").write_bytes(content)
    edit(path, state=name)


FILES = {
    "a folder": (lambda p: replaced(p, lambda q: q.mkdir()), "expected a saved sequence, found a folder"),
    "a pipe": (lambda p: replaced(p, os.mkfifo), "expected a saved sequence, found no regular file"),
    "deep": (deepened, "cannot be read as JSON"),
    "no text": (lambda p: p.write_bytes(b"\xff\xfe\xff"), "cannot be read as JSON"),
    "a page that is a folder": (lambda p: replaced(blobs(p.parent)[0], lambda q: q.mkdir()), "expected a page, found a folder"),
    "a page that is a pipe": (lambda p: replaced(blobs(p.parent)[0], os.mkfifo), "expected a page, found no regular file"),
    "a page without data": (lambda p: page_of(p, {}, b""), "expected .*, got none"),
    "a page of another dtype": (
        lambda p: page_of(p, {"a" * 9999: {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}, b"\0"),
        "expected none, got|no safetensors file",
    ),
    "a page that points outside": (
        lambda p: page_of(p, {"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, b"\0"),
        "no safetensors file",
    ),
}

# Values in place of a field's own, with a checksum that is right.
FIELDS = {
    "seq_len": (10**9, 3 * 10**10, 10**15, 10**4000, -1, 1.5, True, "300", None),
    "min_len": (10**15, 10**4000, -(10**4000), [], None),
    "extra": (None, [], 3, "text", {"a": 1}, {"a": None}, {"a": {"b": "c"}}),
    "tensors": (None, [], 3, "text", {"a": None}, {"a": ["b"]}, {"a": {"b": 3}}),
    "spec_fields": (None, [], 3, "text"),
    "spec": (None, 3, {}),
    "history": (None, {}, "text", [None], [[]], [""], ["../../a"], ["a" * 10**6], [1] * 10**6),
    "window": (None, {}, "text", [None], [{}], ["a"], ["a" * 64] * 10**5),
    "state": (None, "", [], {}, "a/b", "a" * 10**6),
    "version": (None, [], "2", 10**4000, {"a": 1}),
    "format": (None, [], {}, "a" * 10**6),
}


def refused(cache, path, match):
    before = counts(cache)
    with pytest.raises(SavedFileError, match=match) as caught:
        cache.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < LONGEST_MESSAGE
    assert counts(cache) == before
    cache.check_integrity(memory=True)


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_saved_sequence(kept, kind):
    cache, path = kept
    spoil, match = FILES[kind]
    spoil(path)
    refused(cache, path, match)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_kind(kept, field):
    cache, path = kept
    good = path.read_text()
    for value in FIELDS[field]:
        path.write_text(good)
        edit(path, **{field: value})
        refused(cache, path, "expected")
    path.write_text(good)  # the twin: what was spoiled loads as it was
    assert cache.load(path).extra == {"name": "a"}


def test_fields_of_another_spec(kept):
    """The difference is found in whatever the manifest says its spec was."""
    cache, path = kept
    for value in (None, [], "text", 3, {}, {"row_format": 10**4000}, {"row_format": "a" * 10**6}, {"layers": {"a": []}}):
        edit(path, spec="another", spec_fields=value)
        refused(cache, path, "of another spec|spec_fields: expected")


@pytest.mark.parametrize("extra", [{"a": 1}, {1: "a"}, {"a": None}, ["a"]])
def test_extra_of_another_type_is_not_saved(kept, extra):
    cache, path = kept
    request, before = cache.requests.opened[0], sorted(path.parent.rglob("*"))
    with pytest.raises(TypeError, match="extra: expected strings by name, got"):
        cache.save(request, path.parent / "b.dsv4kv", extra)
    assert sorted(path.parent.rglob("*")) == before


def test_a_page_that_is_a_pipe_is_mended_by_the_next_save(kept):
    cache, path = kept
    replaced(blobs(path.parent)[0], os.mkfifo)
    cache.save(cache.requests.opened[0], path)
    cache.load(path)


@pytest.mark.parametrize(
    "spoil",
    [
        deepened,
        lambda p: p.write_text("[1, 2]"),
        lambda p: p.write_text(p.read_text().replace('"seq_len": 300', '"seq_len": 301')),
        lambda p: edit(p, history="text"),
        lambda p: edit(p, history=[[]]),
        lambda p: edit(p, version=[DEEP]),
    ],
)
def test_a_manifest_that_prune_cannot_trust_keeps_everything(kept, spoil):
    _, path = kept
    spoil(path)
    before = blobs(path.parent)
    with pytest.raises(SavedFileError, match="nothing was removed") as caught:
        prune_saved(path.parent)
    assert len(str(caught.value)) < LONGEST_MESSAGE
    assert blobs(path.parent) == before


def test_prune_passes_over_what_is_no_file(kept):
    _, path = kept
    path.unlink()
    pages = path.parent / saved_module.BLOB_FOLDER
    (path.parent / "b.dsv4kv").mkdir()
    os.mkfifo(path.parent / "c.dsv4kv")
    (pages / "d.safetensors").mkdir()
    os.mkfifo(pages / "e.safetensors")
    (pages / "f.safetensors").symlink_to("nowhere")
    (path.parent / ".dsv4kv-g.tmp").mkdir()
    found = prune_saved(path.parent)
    assert (found.sequences, found.kept_files, found.removed_files) == (0, 0, 6)  # three history, two window pages, the state
    assert prune_saved(path.parent).removed_files == 0


def dump_of(path, metadata):
    from safetensors.torch import save_file

    save_file({}, path, metadata=metadata)


DUMPS = {
    "a folder": (lambda p: p.mkdir(), "found a folder"),
    "a pipe": (os.mkfifo, "found no regular file"),
    "no header": (lambda p: dump_of(p, {"kind": KIND}), "got"),
    "a header that is no JSON": (lambda p: dump_of(p, {"kind": KIND, "dump": "{"}), "got"),
    "a deep header": (lambda p: dump_of(p, {"kind": KIND, "dump": DEEP}), "got"),
    "a header of something else": (lambda p: dump_of(p, {"kind": KIND, "dump": '{"message": "a"}'}), "got"),
    "a list": (lambda p: dump_of(p, {"kind": KIND, "dump": "[]"}), "got"),
}


@pytest.mark.parametrize("kind", DUMPS)
def test_what_is_no_dump(tmp_path, capsys, kind):
    make, match = DUMPS[kind]
    make(tmp_path / "dump")
    with pytest.raises(SavedFileError, match=f"expected an {KIND}, {match}"):
        read_dump(tmp_path / "dump")
    assert main(["inspect", str(tmp_path / "dump")]) == 1
    assert len(capsys.readouterr().err) < LONGEST_MESSAGE
