"""Streams from a server, with the arrival time of every token."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp

from sglang_dsv4.check.client import GENERATE, TIMEOUT_S, Client

_DATA = b"data: {"


class StreamError(OSError):
    """A stream is not what was asked for."""


class TimedReply(NamedTuple):
    """One answer, and when its tokens arrived.

    Attributes:
        token_ids (tuple[int, ...]): what was generated.
        prompt_tokens (int): length of the prompt.
        cached_tokens (int): how many of them the prefix cache served.
        sent_s (float): when it was sent.
        arrivals (tuple[tuple[float, int], ...]): times, and how many tokens had arrived by then.
    """

    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    sent_s: float
    arrivals: tuple[tuple[float, int], ...]

    @property
    def first_token_s(self) -> float:
        """From sending to the first token."""
        return self.arrivals[0][0] - self.sent_s

    def gaps_s(self) -> list[float]:
        """Time per token after the first; tokens that arrived together share it."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(now - before) / (has - had) for (before, had), (now, has) in pairs for _ in range(has - had)]


@dataclass
class Stream:
    """What arrived over one connection; it is read once nothing is timed any more.

    Attributes:
        sent_s (float): when the request was sent.
        pieces (list[tuple[float, bytes]]): what arrived, and when.
    """

    sent_s: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def token_ids(self) -> tuple[int, ...]:
        """All tokens, from the last event."""
        text = b"".join(piece for _, piece in self.pieces)
        return tuple(_event(text[text.rindex(_DATA) :].split(b"\n", 1)[0])["output_ids"])

    def reply(self) -> TimedReply:
        """Read it all.

        Raises:
            StreamError: the server reports an error, or sent no token.
        """
        arrivals: dict[int, float] = {}
        rest, last = b"", {}
        for now_s, piece in self.pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(_DATA):
                    last = _event(line)
                    arrivals.setdefault(last["meta_info"]["completion_tokens"], now_s)
        arrivals.pop(0, None)
        if not arrivals:
            raise StreamError("stream: expected at least one token, got none")
        meta = last["meta_info"]
        times = tuple((now_s, count) for count, now_s in arrivals.items())
        return TimedReply(tuple(last["output_ids"]), meta["prompt_tokens"], meta["cached_tokens"], self.sent_s, times)


def _event(line: bytes) -> dict[str, Any]:
    event = json.loads(line[len(b"data: ") :])
    if "error" in event:
        raise StreamError(f"stream: expected tokens, got {event['error']}")
    return dict(event)


class TimedClient(Client):
    """One server, whose streams are timed.

    Streams are read with aiohttp: with 64 answers at once a piece costs 21 us of this process there, and 79 us with httpx and
    httpx-sse, which is more than the server's own time for a token.

    Args:
        url (str): such as ``http://127.0.0.1:30000``.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._url = url

    async def __aenter__(self) -> "TimedClient":
        timeout, connector = aiohttp.ClientTimeout(total=TIMEOUT_S), aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(self._url, timeout=timeout, connector=connector)
        return self

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()
        await super().close()

    async def timed_stream(self, prompt_ids: Sequence[int], new_tokens: int) -> Stream:
        """Ask for a greedy continuation of exactly ``new_tokens`` tokens.

        Raises:
            StreamError: the server did not answer, it refused, or its answer broke off.
        """
        sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
        body = {"input_ids": list(prompt_ids), "sampling_params": sampling, "stream": True}
        found = Stream(time.perf_counter())
        try:
            async with self._session.post(GENERATE, json=body) as response:
                if response.status != 200:
                    raise StreamError(f"stream: expected status 200, got {response.status}: {(await response.text())[:500]!r}")
                async for piece in response.content.iter_any():
                    found.pieces.append((time.perf_counter(), piece))
        except aiohttp.ClientError as error:
            raise StreamError(f"stream: expected a whole answer, got {type(error).__name__}: {error}") from error
        return found
