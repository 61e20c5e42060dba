"""The warm-up that SGLang runs on a GPU before it listens."""

import asyncio
from types import SimpleNamespace

import pytest

from sglang_dsv4.plugin.install import warm_up
from tests.plugin.serving import generate, prompt, serving
from tests.plugin.test_server import facts_of

VOCAB = 50


class Manager:
    """SGLang's TokenizerManager, which notes what it is sent."""

    def __init__(self, chunk, most, flushed=True):
        self.server_args = SimpleNamespace(chunked_prefill_size=chunk)
        self.model_config = SimpleNamespace(vocab_size=VOCAB)
        self.max_req_input_len = most
        self.sent, self.running, self.most_at_once, self.flushes = [], 0, 0, 0
        self._flushed = flushed

    async def generate_request(self, request, _):
        self.sent.append(request.input_ids)
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        for _ in range(request.sampling_params["max_new_tokens"]):
            await asyncio.sleep(0)
            yield {}
        self.running -= 1

    async def flush_cache(self, timeout_s):
        assert self.running == 0 and timeout_s > 0
        self.flushes += 1
        return SimpleNamespace(success=self._flushed, message="busy")


@pytest.mark.parametrize(
    ("named", "skip", "expected"),
    [
        (None, False, "dsv4"),
        ("voice_chat", False, "voice_chat,dsv4"),
        ("dsv4", False, "dsv4"),
        ("voice_chat", True, "voice_chat"),
        (None, True, None),
    ],
)
def test_it_is_asked_for_once(named, skip, expected):
    args = SimpleNamespace(warmups=named, skip_server_warmup=skip)
    warm_up.ask_for(args)
    assert args.warmups == expected


@pytest.mark.parametrize("longest", [1, 15, 16, 17, 700, 8192])
def test_lengths_double_up_to_the_longest(longest):
    lengths = warm_up.prompt_lengths(longest)
    assert lengths[-1] == longest and lengths == sorted(set(lengths))
    assert all(b <= 2 * a for a, b in zip(lengths, lengths[1:], strict=False))


@pytest.mark.sglang
@pytest.mark.parametrize(("chunk", "most", "longest"), [(512, 100_000, 512), (-1, 3000, 1500), (8192, 3000, 1500)])
def test_prompts_of_all_lengths_then_short_ones_together(chunk, most, longest, caplog):
    manager = Manager(chunk, most)
    with caplog.at_level("INFO"):
        asyncio.run(warm_up.warm_up("null", manager))
    lengths = [len(ids) for ids in manager.sent]
    assert lengths[:-8] == warm_up.prompt_lengths(longest) and lengths[-8:] == [5] * 8
    assert (manager.most_at_once, manager.flushes) == (8, 1)
    assert all(0 <= token < VOCAB for ids in manager.sent for token in ids)
    assert "warm after" in caplog.text and "stay in the prefix cache" not in caplog.text


@pytest.mark.sglang
def test_a_cache_that_keeps_the_prompts_is_mentioned(caplog):
    asyncio.run(warm_up.warm_up("null", Manager(64, 1000, flushed=False)))
    assert "stay in the prefix cache: busy" in caplog.text


@pytest.mark.sglang
@pytest.mark.long
def test_a_server_forgets_it(warm, tiny):
    """On a CPU it must be asked for; there is nothing to compile."""
    with serving(warm, tiny, ("--warmups", "dsv4", "--chunked-prefill-size", "256")) as server:
        lines = [line for line in server.log_lines() if "sglang_dsv4: warm" in line]
        usage = facts_of(server)["usage"]
        assert generate(server, prompt(300))[2] == 0
    assert len(lines) == 2 and "prompts of 16, 32, 64, 128, 256 tokens" in lines[0]
    # SGLang's own first request stays in the prefix cache: a page at most.
    assert usage["history_pages"]["used"] == 0 and usage["history_pages"]["cached"] <= 1
