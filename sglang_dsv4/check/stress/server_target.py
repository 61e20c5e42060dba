"""A running server under stress."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from sglang_dsv4.check.client import GENERATE, Client, Transport
from sglang_dsv4.check.reply import Ids, Question, Reply, Token, check_scored
from sglang_dsv4.check.stress.cases import CHAT, Case
from sglang_dsv4.check.stress.load import Load, Sample, Watch, drive, sample_pools
from sglang_dsv4.check.stress.replies import Outcome, read_stream, read_whole, request_body

# What the kernel buffers for a client that does not read. Much less makes TCP send a little at a time, for minutes.
SLOW_BUFFER_BYTES = 1 << 16
# Requests in a row without a reply, after which the server counts as gone.
PATIENCE = 20
IDLE_S = 120.0


class ServerTarget:
    """One server: many requests at once, and one alone on a cold cache.

    Args:
        url (str): such as ``http://127.0.0.1:30000``.
        name (str): how the command line names it.
        memory_bytes (Callable[[], int] | None): memory of all the server's processes, if they are known.
        transport (Transport | None): for tests; None: the network.
    """

    idle_s = IDLE_S

    def __init__(
        self, url: str, name: str = "URL", memory_bytes: Callable[[], int] | None = None, transport: Transport | None = None
    ) -> None:
        self.name = name
        self._client = Client(url, transport)
        self._slow_client = Client(url, transport, receive_bytes=SLOW_BUFFER_BYTES)
        self._memory_bytes = memory_bytes
        self._began = time.monotonic()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
        await self._slow_client.close()

    async def run(self, load: Load, watch: Watch, is_stopped: Callable[[], bool]) -> tuple[list[Outcome], list[Sample]]:
        """Put the load on the server, and watch its pools meanwhile.

        Raises:
            ConnectionError: it stopped answering.
            ValueError: our cache does not run there.
        """
        samples: list[Sample] = []
        sampler = asyncio.create_task(sample_pools(self.facts, samples, lambda: watch.num_done))
        outcomes = await drive(self.send, load, watch.note, lambda: watch.num_silent >= PATIENCE or is_stopped())
        sampler.cancel()
        (ended,) = await asyncio.gather(sampler, return_exceptions=True)
        if watch.num_silent >= PATIENCE:
            raise ConnectionError(f"the server stopped answering: {outcomes[-1].faults[0]}")
        if not isinstance(ended, asyncio.CancelledError):
            raise ended
        return outcomes, samples

    async def send(self, case: Case) -> Outcome:
        """Send one case and wait for all of its answer, or as much of it as its client wants.

        A server that is gone, or a reply that cannot be read, is a fault of the outcome and is not raised.
        """
        started = time.monotonic()
        first: list[float] = []
        try:
            status, answers, faults = await self._exchange(case, first)
        except (httpx.TransportError, ValueError, KeyError, TypeError) as error:
            status, answers, faults = 0, (), [f"{type(error).__name__}: {error}"]
        took, until_first = time.monotonic() - started, first[0] - started if first else None
        return Outcome(case, status, answers, tuple(faults), started - self._began, took, until_first)

    async def ask(self, question: Question) -> Reply:
        """The answer to a question alone on a cold cache, with margins.

        Raises:
            httpx.HTTPError: the server did not answer, or refused; it refuses to empty its cache while a request runs.
            ValueError: the reply is incomplete, or came from a cache that was not cold.
        """
        prompt_ids, new_tokens, stop = question
        await self._client.flush()
        body = request_body(Case(0, "alone", GENERATE, (prompt_ids,), new_tokens=new_tokens, stop=stop), "")
        sampling = body["sampling_params"]
        rid = f"alone-{time.monotonic_ns()}"
        reply = check_scored(await self._client.generate(prompt_ids, new_tokens, sampling_params=sampling, rid=rid))
        if reply.cached_tokens:
            raise ValueError(f"reference: expected a cold cache, got {reply.cached_tokens} tokens from it")
        return reply

    async def score(self, prompt_ids: Ids, token_ids: Ids) -> Sequence[Token]:
        """Tokens behind a prompt, scored in one prefill on a cold cache; raises as `ask`."""
        await self._client.flush()
        return await self._client.score(prompt_ids, token_ids)

    async def tokenize(self, message: str) -> Ids:
        """The tokens that the server makes of a chat.

        Raises:
            httpx.HTTPError: the server did not answer, or refused.
            KeyError: it does not return them.
        """
        body = request_body(Case(0, "alone", CHAT, message=message, new_tokens=1), "")
        reply = await self._client.post(CHAT, {**body, "return_prompt_token_ids": True})
        return tuple(reply["choices"][0]["prompt_token_ids"])

    async def facts(self) -> dict[str, Any]:
        """`Client.plugin_facts`, with the memory of all processes where it is known."""
        facts = await self._client.plugin_facts()
        if self._memory_bytes is not None:
            facts["memory"] = {**facts["memory"], "all_processes_bytes": self._memory_bytes()}
        return facts

    async def _exchange(self, case: Case, first: list[float]) -> tuple[int, tuple[Reply, ...], list[str]]:
        rid = f"stress-{case.number}-{time.monotonic_ns()}"
        body = request_body(case, rid)
        if not case.stream:
            response = await self._client.send(case.endpoint, body)
            is_answered = response.status_code == httpx.codes.OK
            return response.status_code, read_whole(case, response.json()) if is_answered else (), []
        client = self._slow_client if case.pause_s else self._client
        async with client.stream(case.endpoint, body) as (status, incoming):
            if status != httpx.codes.OK:
                return status, (), []
            events, is_done = [], False
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
                    await self._client.send("/abort_request", {"rid": rid})
        return status, *read_stream(case, events, is_done)
