"""Streams from a server, with the time of every token."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

TIMEOUT_S = 600.0
_DATA = b"data: {"
_PIECE_BYTES = 1 << 16


class StreamError(ValueError):
    """A stream is not what was asked for."""


@dataclass(frozen=True)
class Reply:
    """One answer, and when its tokens came.

    Attributes:
        token_ids (tuple[int, ...]): what was generated.
        prompt_tokens (int): length of the prompt.
        cached_tokens (int): how many of it the prefix cache served.
        sent_s (float): when it was sent.
        arrivals (tuple[tuple[float, int], ...]): times, and how many tokens had come by then.
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
        """Time per token after the first; tokens that came together share what they took."""
        found: list[float] = []
        for (before, had), (now, has) in zip(self.arrivals, self.arrivals[1:], strict=False):
            found += [(now - before) / (has - had)] * (has - had)
        return found


class Stream:
    """What came over one connection; it is read when nothing is being timed any more.

    Args:
        sent_s (float): when the request was sent.
    """

    def __init__(self, sent_s: float) -> None:
        self.sent_s = sent_s
        self._pieces: list[tuple[float, bytes]] = []

    def add(self, now_s: float, piece: bytes) -> None:
        """Keep a piece."""
        self._pieces.append((now_s, piece))

    def check_status(self) -> None:
        """Raise unless the server took the request.

        Raises:
            StreamError: with the beginning of what it said instead.
        """
        head = b"".join(piece for _, piece in self._pieces[:4])
        status = head.split(b"\r\n", 1)[0]
        if status.split(b" ")[1:2] != [b"200"]:
            raise StreamError(f"stream: expected status 200, got {head[:500].decode(errors='replace')!r}")

    def token_ids(self) -> tuple[int, ...]:
        """All tokens, from the last event."""
        text = b"".join(piece for _, piece in self._pieces[-4:])
        if text.count(_DATA) == 0:
            text = b"".join(piece for _, piece in self._pieces)
        line = text[text.rindex(_DATA) :].split(b"\n", 1)[0]
        return tuple(_event(line)["output_ids"])

    def reply(self) -> Reply:
        """Read it all.

        Raises:
            StreamError: the server reports an error, or sent no token.
        """
        arrivals: list[tuple[float, int]] = []
        rest, last = b"", None
        for now_s, piece in self._pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(_DATA):
                    last = _event(line)
                    count = last["meta_info"]["completion_tokens"]
                    if count > (arrivals[-1][1] if arrivals else 0):
                        arrivals.append((now_s, count))
        if last is None or not arrivals:
            raise StreamError("stream: expected at least one token, got none")
        meta = last["meta_info"]
        return Reply(
            token_ids=tuple(last["output_ids"]),
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
            sent_s=self.sent_s,
            arrivals=tuple(arrivals),
        )


def _event(line: bytes) -> dict[str, Any]:
    event = json.loads(line[len(b"data: ") :])
    if "error" in event:
        raise StreamError(f"stream: expected tokens, got {event['error']}")
    return dict(event)


class ServeClient:
    """One server.

    Args:
        url (str): such as ``http://127.0.0.1:30000``.
    """

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        self._http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False, limits=limits)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def flush(self) -> None:
        """Empty the prefix cache, once no request runs."""
        (await self._http.post("/flush_cache?timeout=120")).raise_for_status()

    async def server_info(self) -> dict[str, Any]:
        """``/server_info``'s first internal state."""
        reply = (await self._http.get("/server_info")).raise_for_status()
        return dict(reply.json()["internal_states"][0])

    async def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """One request that is not timed."""
        return dict((await self._http.post("/generate", json=body)).raise_for_status().json())

    async def stream(self, prompt_ids: Sequence[int], new_tokens: int) -> Stream:
        """Ask for a greedy continuation of exactly ``new_tokens`` tokens.

        Bytes are read off a bare connection: with 64 answers at once an HTTP library in Python takes longer for a token than
        the server. HTTP/1.0 keeps the server from cutting the body into chunks.

        Raises:
            OSError: the server did not answer.
            StreamError: it refused, or its answer broke off.
        """
        body = {
            "input_ids": list(prompt_ids),
            "sampling_params": {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True},
            "stream": True,
        }
        content = json.dumps(body).encode()
        head = (
            f"POST /generate HTTP/1.0\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            found = Stream(time.perf_counter())
            writer.write(head.encode() + content)
            await writer.drain()
            while piece := await asyncio.wait_for(reader.read(_PIECE_BYTES), TIMEOUT_S):
                found.add(time.perf_counter(), piece)
        finally:
            writer.close()
        found.check_status()
        return found
