"""Requests to one SGLang server, many at once."""

import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
from httpx_sse import EventSource

from sglang_dsv4.check.reply import Ids, Reply, Token, check_scored, generate_body, read_reply, read_token

TIMEOUT_S = 600.0
FLUSH_S = 120
GENERATE = "/generate"
_DONE = "[DONE]"
Transport = httpx.AsyncBaseTransport
Events = AsyncGenerator[dict[str, Any] | None, None]


class Client:
    """One server.

    Args:
        url (str): such as ``http://127.0.0.1:30000``.
        transport (Transport | None): for tests; None: the network.
        receive_bytes (int | None): what the kernel buffers for this client; None: the system's default.
    """

    def __init__(self, url: str, transport: Transport | None = None, *, receive_bytes: int | None = None) -> None:
        buffers = [(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)] if receive_bytes else None
        limits = httpx.Limits(max_connections=None)
        # A proxy named in the environment must not come between two processes of one machine.
        transport = transport or httpx.AsyncHTTPTransport(limits=limits, trust_env=False, socket_options=buffers)
        self._http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, transport=transport, trust_env=False)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """POST a body, whatever the status of the response."""
        return await self._http.post(path, json=body)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST a body; the JSON of the response.

        Raises:
            httpx.HTTPError: the server did not answer, or refused.
        """
        return (await self.send(path, body)).raise_for_status().json()

    @asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[tuple[int, Events]]:
        """POST a body; the status, and every event of the stream as it arrives, then None for a proper end."""
        async with self._http.stream("POST", path, json=body) as response, aclosing(_events(response)) as events:
            yield response.status_code, events

    async def flush(self) -> None:
        """Empty the prefix cache, once no request runs.

        Raises:
            httpx.HTTPError: the server did not answer, or a request still ran.
        """
        (await self._http.post("/flush_cache", params={"timeout": FLUSH_S})).raise_for_status()

    async def generate(self, prompt_ids: Sequence[int], new_tokens: int, **more: Any) -> Reply:
        """A greedy continuation of exactly ``new_tokens`` tokens, each with its log-probability and margin.

        Args:
            prompt_ids (Sequence[int]): token ids.
            new_tokens (int): how many.
            more (Any): further fields of the body, as `generate_body`.

        Raises:
            httpx.HTTPError: the server did not answer, or refused.
            ValueError: the reply is incomplete.
        """
        return read_reply(await self.post(GENERATE, generate_body(prompt_ids, new_tokens, **more)))

    async def score(self, prompt_ids: Ids, token_ids: Ids) -> list[Token]:
        """What the server would have chosen at each place of a given continuation, in one prefill.

        Raises:
            httpx.HTTPError: the server did not answer, or refused.
            ValueError: log-probabilities are missing.
        """
        body = generate_body((*prompt_ids, *token_ids), 1, logprob_start_len=len(prompt_ids) - 1)
        meta = (await self.post(GENERATE, body))["meta_info"]
        # The first token has no predecessor among those asked for, and no log-probability.
        values, best = meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:]
        tokens = [read_token(value, row) for value, row in zip(values, best, strict=True)]
        if [token.token_id for token in tokens] != list(token_ids):
            raise ValueError(f"score: expected log-probabilities of {list(token_ids)}, got {[t.token_id for t in tokens]}")
        check_scored(Reply(tuple(tokens)))
        return tokens

    async def server_info(self) -> dict[str, Any]:
        """``/server_info``.

        Raises:
            httpx.HTTPError: the server did not answer.
        """
        return dict((await self._http.get("/server_info")).raise_for_status().json())

    async def plugin_facts(self) -> dict[str, Any]:
        """What the plug-in says about itself, and ``model_path``, ``dtype`` and ``enable_cache_report`` of the server.

        Raises:
            httpx.HTTPError: the server did not answer.
            ValueError: the plug-in does not run there.
        """
        info = await self.server_info()
        facts = (info.get("internal_states") or [{}])[0].get("sglang_dsv4")
        if facts is None:
            raise ValueError("/server_info: expected facts of sglang_dsv4, got none; the server runs without this cache")
        return {**facts, **{name: info.get(name) for name in ("model_path", "dtype", "enable_cache_report")}}


async def _events(response: httpx.Response) -> Events:
    async for event in EventSource(response).aiter_sse():
        if event.data == _DONE:
            yield None
            return
        yield json.loads(event.data)
