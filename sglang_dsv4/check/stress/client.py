"""Sends cases to an SGLang server."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import httpx

from sglang_dsv4.check.demo.client import TIMEOUT_S
from sglang_dsv4.check.stress.answers import (
    Answer,
    Outcome,
    read_native,
    read_native_stream,
    read_openai,
    read_openai_stream,
    request_body,
)
from sglang_dsv4.check.stress.cases import CHAT, GENERATE, Case

FLUSH_S = 120
# What the kernel keeps for a client that does not read. Much less makes TCP send a little at a time, for minutes.
SLOW_BUFFER_BYTES = 1 << 16
_DATA, _DONE = "data: ", "[DONE]"


class StressClient:
    """One server, many requests at once.

    Args:
        url (str): such as ``http://127.0.0.1:30000``.
        transport (httpx.AsyncBaseTransport | None): for tests; None: the network.
    """

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        limits = httpx.Limits(max_connections=None)
        narrow = [(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER_BYTES)]
        self._http, self._slow_http = (
            httpx.AsyncClient(
                base_url=url,
                timeout=5 * TIMEOUT_S,
                transport=transport or httpx.AsyncHTTPTransport(limits=limits, trust_env=False, socket_options=options),
                trust_env=False,
            )
            for options in (None, narrow)
        )
        self._began = time.monotonic()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()
        await self._slow_http.aclose()

    async def send(self, case: Case) -> Outcome:
        """Send one case and wait for all of its answer, or as much of it as its client wants.

        A server that is gone, or sends what is no reply, is a fault of the outcome and not raised.
        """
        started = time.monotonic()
        first: list[float] = []
        try:
            status, answers, faults = await self._exchange(case, first)
        except (httpx.TransportError, json.JSONDecodeError, KeyError, TypeError) as error:
            status, answers, faults = 0, (), (f"{type(error).__name__}: {error}",)
        return Outcome(
            case,
            status,
            answers,
            tuple(faults),
            started - self._began,
            time.monotonic() - started,
            first[0] - started if first else None,
        )

    async def generate_alone(self, prompt_ids: Sequence[int], new_tokens: int, stop: Sequence[str] = ()) -> dict[str, Any]:
        """Empty the server's cache, and ask for one greedy continuation with the two best log-probabilities.

        Raises:
            httpx.HTTPError: the server did not answer, or refused; it refuses to empty its cache while a request runs.
        """
        await self._flush()
        case = Case(0, "alone", GENERATE, (tuple(prompt_ids),), new_tokens=new_tokens, stop=tuple(stop))
        body = request_body(case, f"alone-{time.monotonic_ns()}")
        body["top_logprobs_num"] = 2
        reply = (await self._http.post(GENERATE, json=body)).raise_for_status().json()
        return dict(reply)

    async def read_again(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> tuple[float, ...]:
        """Log-probabilities of tokens behind a prompt, from one prefill of both on a cold cache.

        Raises:
            httpx.HTTPError: as `generate_alone`.
        """
        await self._flush()
        case = Case(0, "again", GENERATE, ((*prompt_ids, *token_ids),), new_tokens=1)
        body = request_body(case, f"again-{time.monotonic_ns()}")
        body["logprob_start_len"] = len(prompt_ids) - 1
        reply = (await self._http.post(GENERATE, json=body)).raise_for_status().json()
        values = reply["meta_info"]["input_token_logprobs"][-len(token_ids) :]
        return tuple(float(value) for value, *_ in values)

    async def chat_ids(self, message: str) -> tuple[int, ...]:
        """The tokens that the server makes of a chat.

        Raises:
            httpx.HTTPError: the server did not answer, or refused.
            KeyError: it does not say.
        """
        body = request_body(Case(0, "alone", CHAT, message=message, new_tokens=1), "")
        body["return_prompt_token_ids"] = True
        reply = (await self._http.post(CHAT, json=body)).raise_for_status().json()
        return tuple(reply["choices"][0]["prompt_token_ids"])

    async def facts(self) -> dict[str, Any]:
        """What the plug-in says about itself in ``/server_info``.

        Raises:
            httpx.HTTPError: the server did not answer.
            ValueError: the plug-in does not run there.
        """
        info = (await self._http.get("/server_info")).raise_for_status().json()
        facts = (info.get("internal_states") or [{}])[0].get("sglang_dsv4")
        if facts is None:
            raise ValueError("/server_info: expected facts of sglang_dsv4, got none")
        names = ("model_path", "dtype", "enable_cache_report")
        return {**facts, **{name: info.get(name) for name in names}}

    async def _flush(self) -> None:
        (await self._http.post(f"/flush_cache?timeout={FLUSH_S}")).raise_for_status()

    async def _exchange(self, case: Case, first: list[float]) -> tuple[int, tuple[Answer, ...], Sequence[str]]:
        rid = f"stress-{case.number}-{time.monotonic_ns()}"
        body = request_body(case, rid)
        if not case.stream:
            response = await self._http.post(case.endpoint, json=body)
            if response.status_code != httpx.codes.OK:
                return response.status_code, (), ()
            reply = response.json()
            read = read_native(case, reply) if case.endpoint == GENERATE else read_openai(reply)
            return response.status_code, read, ()
        http = self._slow_http if case.pause_s else self._http
        async with http.stream("POST", case.endpoint, json=body) as response:
            if response.status_code != httpx.codes.OK:
                return response.status_code, (), ()
            events, is_done = [], False
            async with aclosing(_events(response)) as incoming:
                async for event in incoming:
                    if event is None:
                        is_done = True
                        break
                    first.append(time.monotonic())
                    events.append(event)
                    if case.pause_s and len(events) == 1:
                        await asyncio.sleep(case.pause_s)
                    if case.leave_after is not None and len(events) == case.leave_after:
                        if not case.abort:
                            break
                        await self._http.post("/abort_request", json={"rid": rid})
        return response.status_code, *read_stream(case, events, is_done)


def read_stream(case: Case, events: Sequence[dict[str, Any]], is_done: bool) -> tuple[tuple[Answer, ...], list[str]]:
    """What the events of a stream amount to, and what is wrong with them as a stream.

    Native events each hold all the text so far; it may only grow, but for a last character of which bytes are missing.
    """
    faults = []
    errors = [event["error"] for event in events if "error" in event]
    if errors:
        return (), [f"the stream says: {errors[0]}"]
    if not is_done and (case.leave_after is None or case.abort):
        faults.append(f"the stream ended after {len(events)} events, without `{_DONE}`")
    if not events:
        return (), faults
    if case.endpoint != GENERATE:
        return read_openai_stream(events), faults
    shown = ""
    for index, event in enumerate(events):
        if not event["text"].startswith(shown.rstrip("\ufffd")):
            faults.append(f"event {index} of the stream has the text {event['text']!r}, after {shown!r}")
        shown = event["text"]
    return read_native_stream(case, events), faults


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
    """Every event of a stream, and None for its end."""
    async for line in response.aiter_lines():
        if line.startswith(_DATA):
            text = line[len(_DATA) :]
            yield None if text == _DONE else json.loads(text)
