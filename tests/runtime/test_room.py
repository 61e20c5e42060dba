"""What cannot fit is refused before anything is computed or dropped; what can is given room."""

import pytest

from sglang_dsv4.errors import OutOfPagesError
from tests.runtime.worlds import assert_nothing_held, assert_right, make_runtime, make_tokens

PAGE = 128


@pytest.fixture
def runtime(small_checkpoint):
    return make_runtime(small_checkpoint, num_pages=6, debug=True)


def refuse(runtime, call):
    """The error of a call that must compute nothing, change no request, and keep every prefix."""
    kept = (runtime.engine.index.num_boundaries, runtime.engine.index.num_ends, runtime.cache.requests.epoch)
    run, runtime.engine.model.run = runtime.engine.model.run, None
    with pytest.raises(OutOfPagesError, match="nothing was changed") as refusal:
        call()
    runtime.engine.model.run = run
    assert (runtime.engine.index.num_boundaries, runtime.engine.index.num_ends, runtime.cache.requests.epoch) == kept
    return refusal.value


@pytest.mark.parametrize("through", ["open", "generate"])
def test_a_prompt_that_can_never_fit_is_refused_at_once(runtime, through):
    prefix = make_tokens(300)
    runtime.open(prefix).close()

    def call(prompt):
        return runtime.open(prompt) if through == "open" else runtime.generate([make_tokens(3), prompt], 1, progress=False)

    error = refuse(runtime, lambda: call(make_tokens(6 * PAGE + 1, salt=1)))
    assert (error.pool, error.needed, error.free) == ("history pages", 7, 6)
    assert runtime.engine.index.known_length(prefix) == 300
    call(make_tokens(6 * PAGE - 1, salt=1))  # all pages, and every prefix goes for it


def test_room_beside_an_open_sequence(runtime, small_oracle):
    handle = runtime.open(make_tokens(200))
    error = refuse(runtime, lambda: runtime.open(make_tokens(4 * PAGE + 1, salt=1)))
    assert (error.needed, error.free) == (5, 4)
    other = runtime.open(make_tokens(4 * PAGE, salt=1))
    assert_right(small_oracle, other)
    other.close()
    handle.close()
    assert_nothing_held(runtime)


def test_whole_pages_of_an_open_sequence_need_no_room(runtime, small_oracle):
    handle = runtime.open(make_tokens(300))  # three pages, of which a longer prompt shares two
    error = refuse(runtime, lambda: runtime.open([*handle.tokens, *make_tokens(5 * PAGE - 299, salt=1)]))
    assert (error.needed, error.free) == (4, 3)
    longer = runtime.open([*handle.tokens, *make_tokens(5 * PAGE - 300, salt=1)])
    assert longer.live().cached_tokens == 300
    assert_right(small_oracle, longer)


def test_growth_that_cannot_fit_keeps_every_prefix(runtime):
    prefix = make_tokens(200, salt=1)
    runtime.open(prefix).close()
    handle = runtime.open(make_tokens(100))
    error = refuse(runtime, lambda: handle.generate(5 * PAGE + 29))
    assert (error.pool, error.needed, error.free) == ("history pages", 6, 5)
    assert runtime.engine.index.known_length(prefix) == 200
    handle.generate(5 * PAGE + 28, stop=())
    assert handle.seq_len == 6 * PAGE


def test_a_last_page_that_only_a_prefix_shares_needs_no_copy(runtime, small_oracle):
    """The handle's own end is in the index; where there is no page for a copy, the end goes and the page is written."""
    handle = runtime.open(make_tokens(5 * PAGE + 100))
    assert runtime.engine.index.num_ends == 1
    handle.append(make_tokens(20, salt=1))
    assert_right(small_oracle, handle)


def test_window_pages_that_snapshots_hold(small_checkpoint, small_oracle):
    """One sequence may be open: 4 + 32 / 8 window pages, and three snapshots that hold two each."""
    runtime = make_runtime(small_checkpoint, num_pages=32, max_requests=1, debug=True)
    kept = []
    for salt in range(3):
        with runtime.open(make_tokens(300, salt=salt)) as handle:
            kept.append(handle.snapshot())
    handle = runtime.open(make_tokens(100, salt=9))
    tokens = handle.tokens
    error = refuse(runtime, lambda: handle.generate(300, stop=()))
    assert (error.pool, error.needed, error.free) == ("window pages", 2, 1)
    assert handle.tokens == tokens
    kept.pop().release()
    handle.generate(300, stop=())
    assert_right(small_oracle, handle)
