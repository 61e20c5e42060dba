"""What the stress test asks: every request is a pure function of the seed and its number."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from sglang_dsv4.check.client import GENERATE
from sglang_dsv4.check.demo.workload import PAGE_TOKENS
from sglang_dsv4.tiny.tokenizer import byte_id

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
EDGES = (4, 128, PAGE_TOKENS)
# A stop string of one ASCII character cannot begin in one token and end in the next.
STOPS = tuple("aeiou 019AEO")
# An agent's first turn has an instruction of more than a page: from then on there is a prefix to hit.
NUM_SESSIONS = 4
NUM_TURNS = 5
FIRST_TURN_TOKENS, TURN_TOKENS = 300, 90
# A slow client's answer is larger than the buffers between it and the server; it reads nothing for this long.
SLOW_TOKENS, SLOW_TOP_LOGPROBS, SLOW_S = 64, 128, 8.0
BURST = 28
_LETTERS = "abcdefghijklmnopqrstuvwxyz    "


@dataclass(frozen=True)
class Case:
    """One HTTP request.

    Attributes:
        number (int): with the seed, what it is.
        workload (str): which kind.
        endpoint (str): path of the server.
        prompts (tuple[tuple[int, ...], ...]): token ids; more than one are sent in one body.
        message (str): of a chat, instead of prompts.
        new_tokens (int): asked for.
        n (int): continuations of each prompt.
        stream (bool): whether the answer is asked for as a stream.
        stop (tuple[str, ...]): stop strings.
        leave_after (int | None): events of the stream after which the client stops listening.
        abort (bool): at that point it asks the server to abort, and listens on.
        pause_s (float): how long the client reads nothing after the first event of the stream.
        top_logprobs (int): best log-probabilities asked for beside each token's, to make an answer large.
        invalid (dict[str, Any] | None): a body that the server must refuse; all else is left out.
    """

    number: int
    workload: str
    endpoint: str = GENERATE
    prompts: tuple[tuple[int, ...], ...] = ()
    message: str = ""
    new_tokens: int = 0
    n: int = 1
    stream: bool = False
    stop: tuple[str, ...] = ()
    leave_after: int | None = None
    abort: bool = False
    pause_s: float = 0.0
    top_logprobs: int = 0
    invalid: dict[str, Any] | None = None

    @property
    def num_answers(self) -> int:
        """Continuations that must come."""
        return self.n * (len(self.prompts) or 1)


def make_case(seed: int, number: int) -> Case:
    """Request ``number`` of the stress test ``seed``."""
    draw = random.Random(f"{seed}/{number}")
    build = draw.choices([kind for kind, _ in WORKLOADS], [weight for _, weight in WORKLOADS])[0]
    return build(seed, number, draw)


def _ids(seed: int, name: str, length: int) -> tuple[int, ...]:
    return _long_text(seed, name)[:length]


@lru_cache(maxsize=4096)
def _long_text(seed: int, name: str) -> tuple[int, ...]:
    draw = random.Random(f"{seed}/{name}")
    return tuple(byte_id(ord(draw.choice(_LETTERS))) for _ in range(1024))


def _short(seed: int, number: int, draw: random.Random) -> Case:
    prompt = _ids(seed, f"short {draw.randrange(24)}", draw.randint(5, 12))
    return Case(number, "short", draw.choice((GENERATE, COMPLETIONS)), (prompt,), new_tokens=8, stream=draw.random() < 0.5)


def _chat(seed: int, number: int, draw: random.Random) -> Case:
    ids = _ids(seed, f"chat {draw.randrange(16)}", draw.randint(8, 12))
    message = "".join(chr(token_id - byte_id(0)) for token_id in ids)
    return Case(number, "chat", CHAT, message=message, new_tokens=6, stream=draw.random() < 0.5)


def _edge(seed: int, number: int, draw: random.Random) -> Case:
    # Half of them around 4: long ones cost most of the time.
    edge = draw.choices(EDGES, (6, 3, 2))[0]
    length = edge + draw.randint(-2, 2)
    prompt = _ids(seed, f"edge {edge}", length)
    return Case(number, "edge", GENERATE, (prompt,), new_tokens=6, stream=draw.random() < 0.5)


def _long(seed: int, number: int, draw: random.Random) -> Case:
    prompt = _ids(seed, f"long {draw.randrange(3)}", draw.choice((513, 530, 640, 769)))
    return Case(number, "long", COMPLETIONS, (prompt,), new_tokens=5, stream=draw.random() < 0.5)


def _agent(seed: int, number: int, draw: random.Random) -> Case:
    """A turn's prompt begins with the whole prompt of the turn before."""
    length = FIRST_TURN_TOKENS + draw.randrange(NUM_TURNS) * TURN_TOKENS
    prompt = _ids(seed, f"agent {draw.randrange(NUM_SESSIONS)}", length)
    return Case(number, "agent", GENERATE, (prompt,), new_tokens=4, stream=draw.random() < 0.3)


def _branch(seed: int, number: int, draw: random.Random) -> Case:
    prompt = _ids(seed, f"branch {draw.randrange(6)}", draw.choice((9, 31, 130)))
    return Case(number, "branch", GENERATE, (prompt,), new_tokens=6, n=draw.randint(2, 4))


def _stop(seed: int, number: int, draw: random.Random) -> Case:
    prompt = _ids(seed, f"stop {draw.randrange(16)}", 14)
    endpoint = draw.choice((GENERATE, COMPLETIONS))
    return Case(number, "stop", endpoint, (prompt,), new_tokens=12, stop=STOPS, stream=draw.random() < 0.5)


def _leave(seed: int, number: int, draw: random.Random, *, abort: bool = False) -> Case:
    prompt = _ids(seed, f"leave {draw.randrange(8)}", draw.choice((11, 40, 132)))
    name, after = "abort" if abort else "leave", draw.randint(1, 6)
    return Case(number, name, GENERATE, (prompt,), new_tokens=60, stream=True, leave_after=after, abort=abort)


def _slow(seed: int, number: int, draw: random.Random) -> Case:
    """A client that stops reading: the server must keep all that it cannot send, and go on with the others."""
    prompt = _ids(seed, f"slow {draw.randrange(4)}", draw.choice((10, 129)))
    return Case(
        number, "slow", GENERATE, (prompt,), new_tokens=SLOW_TOKENS, stream=True, pause_s=SLOW_S, top_logprobs=SLOW_TOP_LOGPROBS
    )


def _burst(seed: int, number: int, draw: random.Random) -> Case:
    """Beside what else runs, more prompts at once than fit; most cross into a new page while they decode, some at once."""
    few = BURST // 4
    prompts = [_ids(seed, f"burst {index}", 3 + index) for index in range(few)]
    prompts += [_ids(seed, f"burst {index}", PAGE_TOKENS - index % 5) for index in range(BURST - few)]
    draw.shuffle(prompts)
    return Case(number, "burst", GENERATE, tuple(prompts), new_tokens=8)


def _invalid(seed: int, number: int, draw: random.Random) -> Case:
    del seed
    endpoint, body = draw.choice(INVALID)
    return Case(number, "invalid", endpoint, invalid=body)


INVALID: tuple[tuple[str, dict[str, Any]], ...] = (
    (GENERATE, {"input_ids": [9, 10_000_000], "sampling_params": {"max_new_tokens": 2}}),
    (GENERATE, {"input_ids": [-1, 9], "sampling_params": {"max_new_tokens": 2}}),
    (GENERATE, {"input_ids": [9, 10], "sampling_params": {"max_new_tokens": -5}}),
    (GENERATE, {"input_ids": [9, 10], "sampling_params": {"temperature": -1.0}}),
    (GENERATE, {"sampling_params": {"max_new_tokens": 2}}),
    (COMPLETIONS, {"model": "default", "prompt": [9, 10], "max_tokens": -5}),
    (CHAT, {"model": "default", "messages": "none"}),
)
Build = Callable[[int, int, random.Random], Case]
# Shares of the requests. Long ones cost a hundred times as much as short ones, and a burst is twenty-four.
WORKLOADS: tuple[tuple[Build, float], ...] = (
    (_short, 33),
    (_chat, 12),
    (_edge, 18),
    (_long, 2),
    (_agent, 8),
    (_branch, 5),
    (_stop, 8),
    (_leave, 4),
    (partial(_leave, abort=True), 3),
    (_slow, 1),
    (_burst, 0.4),
    (_invalid, 5.6),
)
