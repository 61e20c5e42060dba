"""Prompts that begin like earlier ones continue from there."""

import pytest

from sglang_dsv4.runtime.prefix_cache.tree import Entry, PrefixTree
from tests.runtime.worlds import assert_greedy, assert_nothing_held, assert_right, make_runtime, make_tokens


@pytest.fixture
def runtime(small_checkpoint):
    return make_runtime(small_checkpoint, debug=True)


def cached(handle):
    return handle.live().cached_tokens


@pytest.mark.parametrize("length", [3, 127, 128, 129, 256, 300])
def test_a_prompt_that_repeats_is_not_computed(runtime, small_oracle, length):
    prompt = make_tokens(length)
    first = runtime.open(prompt)
    expected = first.fork().generate(5, stop=()).tokens
    first.generate(3, stop=())
    first.close()
    again = runtime.open(prompt)
    assert cached(again) == length
    assert again.generate(5, stop=()).tokens == expected
    again.truncate(length - 2 if length > 2 else 0).append(make_tokens(4, salt=1))
    assert_right(small_oracle, again)


@pytest.mark.parametrize("length", [3, 127, 128, 300])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_follow_up_continues_from_the_last_token(runtime, small_oracle, length, is_open):
    first = runtime.open(make_tokens(length))
    first.generate(11, stop=())
    said = first.tokens
    if not is_open:
        first.close()
    follow = runtime.open([*said, *make_tokens(20, salt=1)])
    assert cached(follow) == len(said)
    assert_right(small_oracle, follow)


def test_an_open_handle_without_logits_is_no_whole_match(runtime, small_oracle):
    """After a roll-back the last token is still to be fed, and nobody knows what follows the one before it."""
    tokens = make_tokens(6)
    handle = runtime.open(tokens).truncate(4)
    runtime.engine.index.clear()
    assert cached(runtime.open(tokens[:2])) == 0
    same = runtime.open(tokens[:3])
    assert cached(same) == 2
    longer = runtime.open(tokens)
    assert cached(longer) == 3
    assert_right(small_oracle, same)
    assert_right(small_oracle, longer)
    handle.generate(1, stop=())
    assert_right(small_oracle, handle)


def test_completions_too(runtime, small_oracle):
    prompt = make_tokens(140)
    done = runtime.generate([prompt], 10, stop=())[0]
    follow = [*prompt, *done.tokens, *make_tokens(5, salt=1)]
    again = runtime.generate([follow, prompt], 3, stop=())
    assert [completion.cached_tokens for completion in again] == [150, 140]
    assert_greedy(small_oracle, follow, again[0].tokens)
    assert again[1].tokens == done.tokens[:3]


def test_a_prompt_that_differs_shares_whole_pages(runtime, small_oracle):
    common = make_tokens(300)
    runtime.open(common).close()
    other = runtime.open([*common[:290], *make_tokens(60, salt=1)])
    assert cached(other) == 256
    assert_right(small_oracle, other)
    assert runtime.open(make_tokens(300, salt=2)).live().cached_tokens == 0
    index = runtime.report().index
    assert (index["hits"], index["lookups"], index["tokens_hit"]) == (1, 3, 256)


def test_prompts_of_one_call_share_what_the_first_computes(runtime, small_oracle):
    system = make_tokens(260)
    prompts = [[*system, *make_tokens(10 + i, salt=i)] for i in range(4)]
    done = runtime.generate(prompts, 3, stop=())
    assert [completion.cached_tokens for completion in done] == [0, 256, 256, 256]
    for prompt, completion in zip(prompts, done, strict=True):
        assert_greedy(small_oracle, prompt, completion.tokens)


def test_a_hit_can_be_rolled_back_like_a_cold_prompt(runtime, small_oracle):
    """So a boundary right before the end is not used: behind it nothing could be taken back."""
    tokens = make_tokens(300)
    runtime.open(tokens[:200]).close()
    for length in (129, 136, 137):
        handle = runtime.open([*tokens[:128], *make_tokens(length - 128, salt=1)])
        assert cached(handle) == (128 if length >= 137 else 0)
        handle.truncate(length - 8).append(make_tokens(2, salt=2))
        assert_right(small_oracle, handle)
        handle.close()
        runtime.engine.index.clear()
        runtime.open(tokens[:200]).close()


def test_the_least_recently_used_goes_first(small_checkpoint):
    runtime = make_runtime(small_checkpoint, num_pages=6, debug=True)
    old, kept, new = (make_tokens(200, salt=i) for i in range(3))
    for prompt in (old, kept, old[:0] or kept, new):
        runtime.open(prompt).close()
    runtime.open(kept).close()
    runtime.open(make_tokens(200, salt=4)).close()  # needs room
    assert runtime.report().index["evictions"] > 0
    assert runtime.engine.index.known_length(kept) == 200
    assert runtime.engine.index.known_length(old) < 200
    assert_nothing_held(runtime)


def test_what_is_in_use_is_not_evicted_for_nothing(small_checkpoint):
    """Dropping an entry whose pages an open sequence holds frees none."""
    runtime = make_runtime(small_checkpoint, num_pages=4)
    handle = runtime.open(make_tokens(300))  # three pages
    kept = runtime.engine.index.num_boundaries
    runtime.open(make_tokens(30, salt=1)).close()
    runtime.open(make_tokens(30, salt=2)).close()
    assert runtime.engine.index.num_boundaries == kept == 2
    handle.close()
    assert_nothing_held(runtime)


def test_ends_are_limited(small_checkpoint):
    runtime = make_runtime(small_checkpoint, max_ends=3)
    for salt in range(6):
        runtime.open(make_tokens(20, salt=salt)).close()
    assert runtime.engine.index.num_ends == 3
    assert [runtime.engine.index.known_length(make_tokens(20, salt=s)) for s in range(6)] == [0] * 3 + [20] * 3
    none = make_runtime(small_checkpoint, max_ends=0)
    none.open(make_tokens(20)).close()
    assert none.engine.index.num_ends == none.engine.index.known_length(make_tokens(20)) == 0


def test_the_tree_finds_every_beginning_and_keeps_no_empty_node():
    tree = PrefixTree(page_tokens=4)
    entries = []
    for tokens in ([], [1], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8]):
        node = tree.grow(tokens)
        tail = tuple(tokens[len(tokens) - len(tokens) % 4 :])
        entries.append(Entry(node, tail or None, None, None))
        tree.add(entries[-1])
    found = list(tree.matches([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert found == entries
    assert list(tree.matches([1, 2, 9])) == entries[:2]
    assert list(tree.matches([2])) == entries[:1]
    for entry in reversed(entries):
        tree.remove(entry)
    assert next(tree.path([1, 2, 3, 4])).is_empty()
    deep = Entry(tree.grow([1] * 12), None, None, None)  # nothing is kept of the two prefixes that lead to it
    tree.add(deep)
    tree.remove(deep)
    assert next(tree.path([1])).is_empty()
