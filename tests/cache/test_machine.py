"""Random operations in random order; see `tests.cache.machine`.

After every one of them the invariants hold, and the bytes of every open sequence are those of a cold run of its tokens,
which an fp64 computation confirmed. ``make stress-cache`` runs the long profile: other examples on every run, and on a
failure it prints the seed (``--hypothesis-seed``) and the shortest program that fails, to be kept here as a test.
"""

import pytest
from hypothesis import settings

from sglang_dsv4.cache.regions import Kind, Part
from tests.cache.driver import FORMATS
from tests.cache.machine import CacheMachine, Oracle
from tests.cache.test_branching import words

# Examples, rules in each at most, and operations that must have been done in all.
PROFILES = {"repeatable": (30, 50, 800), "long": (700, 50, 20_000)}
examples, steps, MIN_DONE = PROFILES[settings.get_current_profile_name()]

TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
RULES = [
    "extend",
    "decode",
    "verify",
    "begin a step",
    "go on with a step",
    "finish a step",
    "abandon a step",
    "open",
    "fork",
    "truncate",
    "snapshot",
    "restore",
    "rewind",
    "release",
    "save",
    "load",
    "close",
    "evict",
    "refused: in a step",
]
# So few examples may leave these out; `tests.cache.test_steps` has programs of them.
RARE = {"go on with a step", "finish a step", "abandon a step", "evict", "refused: in a step"}


def test_every_rule_did_something():
    """After `TestCacheMachine`, in the order of this file: what had nothing to do is not counted."""
    done = CacheMachine.done
    print("\n".join(f"{count:7} {name}" for name, count in sorted(done.items())))
    print(f"{done.total():7} in all")
    assert done.total() >= MIN_DONE
    excused = RARE if settings.get_current_profile_name() == "repeatable" else set()
    assert {name for name in RULES if not done[name]} <= excused


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_the_oracle_notices_a_wrong_entry(formats):
    """The twin of `Oracle.check_values`."""
    machine = CacheMachine()
    machine.start(formats, 128, 0)
    machine.open()
    machine.extend(0, words(300))
    (request,) = machine.tokens
    oracle, cache = Oracle(formats), machine.cache
    oracle.check_values(cache, request, words(300))
    layer = cache.layers[1]
    rows, keys = cache.spec.rows, cache.spec.index_keys
    row = request.pages.history[1] * 32 + 3
    for pool, fmt, at in (
        (layer.memory.storage.pool, rows, layer.memory.storage.num_window_rows + row),
        (layer.memory.storage.tensor(Kind.INDEX_KEY, Part.INDEX), keys, row),
    ):
        group, first = divmod(at, fmt.group_rows)
        stored = pool[group].clone()
        width = stored.numel() if fmt.group_rows == 1 else fmt.data_bytes
        mine = slice(first * width, (first + 1) * width)
        pool[group, mine] = stored[mine].roll(1)
        with pytest.raises(AssertionError):
            oracle.check_values(cache, request, words(300))
        pool[group] = stored
    oracle.check_values(cache, request, words(300))
    machine.every_byte_is_a_cold_run_s()
    machine.teardown()
