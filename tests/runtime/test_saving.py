"""Saved sequences go on in another process."""

import json
import subprocess
import sys

import pytest

from sglang_dsv4.errors import OutOfPagesError, SavedFileError
from tests.runtime.worlds import assert_nothing_held, assert_right, make_runtime, make_tokens

PROGRAM = """
import json, sys
import torch
torch.set_num_threads(1)
from tests.runtime.worlds import make_runtime
runtime = make_runtime(sys.argv[1])
handles = [runtime.load(path) for path in sys.argv[2:]]
tokens = [handle.tokens for handle in handles]
done = [handle.generate(12, stop=()).tokens for handle in handles]
print(json.dumps([tokens, done]))
"""


@pytest.fixture
def runtime(small_checkpoint):
    return make_runtime(small_checkpoint, debug=True)


@pytest.mark.long  # its imports; `tests/cache/test_saved.py` loads in another process each time
def test_another_process_goes_on(runtime, small_checkpoint, tmp_path):
    """At a boundary, within blocks, and after a roll-back, which leaves a token to be fed."""
    paths, expected = [], []
    for number, (length, back) in enumerate([(5, 0), (128, 0), (259, 0), (262, 5)]):
        handle = runtime.open(make_tokens(length)).truncate(length - back)
        paths.append(str(tmp_path / f"{number}.dsv4kv"))
        runtime.save(handle, paths[-1])
        expected.append(list(handle.generate(12, stop=()).tokens))
    command = [sys.executable, "-c", PROGRAM, str(small_checkpoint), *paths]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    tokens, done = json.loads(run.stdout.splitlines()[-1])
    assert tokens == [make_tokens(5), make_tokens(128), make_tokens(259), make_tokens(262)[:257]]
    assert done == expected


def test_branches_that_are_saved_and_loaded(runtime, small_oracle, tmp_path):
    trunk = runtime.open(make_tokens(300))
    branches = [trunk.fork().append(make_tokens(5, salt=s)) for s in range(3)]
    for number, branch in enumerate(branches):
        runtime.save(branch, tmp_path / f"{number}.dsv4kv")
    for number, branch in enumerate(branches):
        loaded = runtime.load(tmp_path / f"{number}.dsv4kv")
        assert loaded.tokens == branch.tokens
        loaded.truncate(300).append(make_tokens(3, salt=7))
        assert_right(small_oracle, loaded)


def test_what_cannot_be_loaded_changes_nothing(small_checkpoint, runtime, tmp_path):
    path = tmp_path / "a.dsv4kv"
    runtime.save(runtime.open(make_tokens(300)), path)
    small = make_runtime(small_checkpoint, num_pages=2)
    with pytest.raises(OutOfPagesError):
        small.load(path)
    assert_nothing_held(small)
    other = make_runtime(small_checkpoint, row_format="bf16")
    with pytest.raises(SavedFileError, match="of another spec: row_format"):
        other.load(path)
    with pytest.raises(SavedFileError, match="found no such file"):
        other.load(tmp_path / "missing")
    assert_nothing_held(other)


def test_a_sequence_that_no_runtime_saved(runtime, tmp_path):
    handle = runtime.open("abc")
    runtime.cache.save(handle.live().request, tmp_path / "bare.dsv4kv")
    with pytest.raises(SavedFileError, match="expected a sequence that Runtime.save wrote, got no tokens"):
        runtime.load(tmp_path / "bare.dsv4kv")
    handle.close()
    assert_nothing_held(runtime)


def test_a_full_cache_makes_room_for_what_is_loaded(small_checkpoint, runtime, small_oracle, tmp_path):
    path = tmp_path / "a.dsv4kv"
    runtime.save(runtime.open(make_tokens(300)), path)
    small = make_runtime(small_checkpoint, num_pages=3)
    small.open(make_tokens(200, salt=1)).close()  # the index holds two pages
    handle = small.load(path)
    handle.truncate(299)
    handle.generate(1, stop=())
    assert_right(small_oracle, handle)
