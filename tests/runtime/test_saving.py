"""Saved sequences go on in another process."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sglang_dsv4.errors import OutOfPagesError, SavedFileError
from sglang_dsv4.runtime.saved import pack_sequence
from sglang_dsv4.runtime.weights import fingerprint
from sglang_dsv4.tiny import write_tiny_checkpoint
from tests.runtime.worlds import SMALL, assert_nothing_held, assert_right, make_runtime, make_tokens

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


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    """The same shape, drawn with another seed."""
    path = tmp_path_factory.mktemp("other")
    write_tiny_checkpoint(path, replace(SMALL, seed=7))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hc_sinkhorn_iters": 2}))
    return path


def test_a_file_of_other_weights_is_refused(runtime, other_checkpoint, tmp_path):
    path = tmp_path / "a.dsv4kv"
    runtime.save(runtime.open(make_tokens(300)), path)
    other = make_runtime(other_checkpoint, debug=True)
    with pytest.raises(SavedFileError, match="expected a sequence of the weights .*, got one of .*other_weights=True"):
        other.load(path)
    assert_nothing_held(other)
    with runtime.load(path) as loaded:
        assert loaded.tokens == tuple(make_tokens(300))


def test_a_file_of_another_dtype_is_refused(runtime, small_checkpoint, tmp_path):
    path = tmp_path / "a.dsv4kv"
    runtime.save(runtime.open(make_tokens(20)), path)
    other = make_runtime(small_checkpoint, dtype="bfloat16")
    with pytest.raises(SavedFileError, match="in bfloat16, got one of"):
        other.load(path)


@pytest.mark.parametrize("is_open", [True, False])
def test_rows_of_other_weights_answer_no_other_prompt(runtime, other_checkpoint, tmp_path, is_open):
    path, prompt = tmp_path / "a.dsv4kv", make_tokens(300)
    runtime.save(runtime.open(prompt), path)
    expected = make_runtime(other_checkpoint).open(prompt).generate(8, stop=()).tokens
    other = make_runtime(other_checkpoint, debug=True)
    foreign = other.load(path, other_weights=True)
    twin = foreign.fork().append(make_tokens(90, salt=1))
    taken = twin.snapshot()
    other.restore(taken).append(make_tokens(3))
    other.save(twin, tmp_path / "b.dsv4kv")
    with pytest.raises(SavedFileError, match="got one of mixed ones"):
        other.load(tmp_path / "b.dsv4kv")
    if not is_open:
        twin.close()
        foreign.close()
    (done,) = other.generate([prompt], 8, stop=(), progress=False)
    assert done.tokens == expected and done.cached_tokens == 0
    assert other.open([*twin.tokens]).live().cached_tokens == 300  # of the prompt just computed


def test_one_changed_value_of_each_kind_changes_the_fingerprint(small_checkpoint):
    model = make_runtime(small_checkpoint).engine.model.model
    found = fingerprint(model)
    assert fingerprint(model) == found
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert fingerprint(model) != found
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] -= 1
    assert fingerprint(model) == found
    model.config.rms_norm_eps *= 2
    assert fingerprint(model) != found


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("tokens", "{", "tokens that cannot be read as JSON"),
        ("tokens", "5", "tokens other than 20 or more ids of 0 .. 263"),
        ("tokens", "[1.5]", "tokens other than"),
        ("tokens", json.dumps([264] * 20), "tokens other than"),
        ("tokens", json.dumps([5] * 19), "tokens other than"),
        ("logits", "%", "logits that are no base64"),
        ("logits", "AAAA", "logits of other than 264 values"),
    ],
)
def test_what_a_runtime_did_not_write_is_refused(runtime, tmp_path, name, value, fault):
    handle, path = runtime.open(make_tokens(20)), tmp_path / "a.dsv4kv"
    extra = pack_sequence(handle.live(), "") | {name: value}
    runtime.cache.save(handle.live().request, path, extra=extra)
    opened = len(runtime.cache.requests.opened)
    with pytest.raises(SavedFileError, match=f"a.dsv4kv: expected a sequence that Runtime.save wrote, got {fault}"):
        runtime.load(path, other_weights=True)
    assert len(runtime.cache.requests.opened) == opened
