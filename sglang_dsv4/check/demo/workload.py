"""What the demonstration asks the server."""

from dataclasses import dataclass

from sglang_dsv4.tiny.tokenizer import byte_id

PAGE_TOKENS = 256
NEW_TOKENS = 20

_PROSE = (
    "A model that reads a million words cannot keep them all as they came. It keeps the last hundred and twenty-eight in "
    "full, and of everything before only summaries: one for every four tokens, and one for every hundred and twenty-eight. "
    "Between two summaries it has to remember where it stopped, and that is where caches go wrong. A request may end in "
    "the middle of a block, share its beginning with another, come back after an hour, or be moved to another machine. "
    "Each time the next summary must come out as if nothing had happened. This text is only here to be long enough: it is "
    "cut into prompts of different lengths, some shorter than a block, some just around its edges, some longer than a "
    "page of the cache. What the model answers makes no sense, since its weights are random; but it makes the same "
    "no-sense every time, and another program that has no cache at all can tell what it should have been. So every number "
    "below was computed twice. If the two do not agree, this program says so and fails. Nothing else would be a proof."
)


@dataclass(frozen=True)
class PlannedRequest:
    """One request.

    Attributes:
        name (str): what is special about it.
        prompt_ids (tuple[int, ...]): token ids.
        wave (int): requests of one wave are sent at the same time, and a wave begins when the one before has ended.
        min_cached_tokens (int): tokens that the prefix cache must serve.
    """

    name: str
    prompt_ids: tuple[int, ...]
    wave: int
    min_cached_tokens: int = 0


def plan_requests() -> tuple[PlannedRequest, ...]:
    """The workload, in the order of the table: lengths around every boundary, a shared prefix, a repetition."""
    plain = (
        ("3 tokens", 3, 0),
        ("4 tokens", 4, 21),
        ("5 tokens", 5, 37),
        ("127 tokens", 127, 60),
        ("129 tokens", 129, 190),
        ("256 tokens", 256, 330),
        ("640 tokens", 640, 115),
    )
    requests = [PlannedRequest(name, _cut(start, length), wave=1) for name, length, start in plain]
    shared = _cut(420, 300)
    again = _cut(230, 270)
    cached = PAGE_TOKENS
    requests += [
        PlannedRequest("prefix of 300, first", shared + _cut(0, 11), wave=1),
        PlannedRequest("prefix of 300, second", shared + _cut(700, 18), wave=2, min_cached_tokens=cached),
        PlannedRequest("repeated, first", again, wave=1),
        PlannedRequest("repeated, second", again, wave=2, min_cached_tokens=cached),
    ]
    return tuple(requests)


def _cut(start: int, length: int) -> tuple[int, ...]:
    """``length`` tokens of the prose from byte ``start``."""
    text = _PROSE.encode()
    if start + length > len(text):
        raise ValueError(f"prompt: expected at most {len(text)} bytes of text, got {start} + {length}")
    return tuple(byte_id(byte) for byte in text[start : start + length])
