"""What is asked of a server: short chats, one long prompt, agents that come back."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from sglang_dsv4.bench.timed_stream import Stream, TimedClient
from sglang_dsv4.check.compare.questions import random_ids
from sglang_dsv4.check.reply import Ids


@dataclass(frozen=True)
class Work:
    """One scenario.

    Attributes:
        name (str): for reports.
        about (str): what it is, in a few words.
        send (Callable[[TimedClient], Awaitable[list[Stream]]]): sends all of it.
    """

    name: str
    about: str
    send: Callable[[TimedClient], Awaitable[list[Stream]]] = field(repr=False)


def chats(concurrency: int, requests: int, prompt_tokens: int, new_tokens: int) -> Work:
    """Clients that each send a chat, wait for all of the answer, and send the next. No two chats begin alike."""
    rng = random.Random(concurrency)
    lengths = [rng.randint(prompt_tokens // 2, 3 * prompt_tokens // 2) for _ in range(requests)]
    prompts = [random_ids(rng, length) for length in lengths]

    async def send(client: TimedClient) -> list[Stream]:
        waiting = iter(prompts)
        found: list[Stream] = []

        async def one_client() -> None:
            for prompt in waiting:
                found.append(await client.timed_stream(prompt, new_tokens))

        await asyncio.gather(*(one_client() for _ in range(concurrency)))
        return found

    about = f"{requests} chats, {concurrency} at once, about {prompt_tokens} tokens and {new_tokens} new"
    return Work(f"chat-{concurrency}", about, send)


def long_prompt(prompt_tokens: int, new_tokens: int) -> Work:
    """One request with a long prompt, alone on a cold cache."""
    prompt = random_ids(random.Random(prompt_tokens), prompt_tokens)

    async def send(client: TimedClient) -> list[Stream]:
        return [await client.timed_stream(prompt, new_tokens)]

    return Work(f"long-{prompt_tokens}", f"one prompt of {prompt_tokens:,} tokens, {new_tokens} new", send)


def agents(count: int, turns: int, system_tokens: int, turn_tokens: int, new_tokens: int) -> Work:
    """Agents that share a system prompt. Each turn sends all that was said so far, answers included, and a bit more."""
    rng = random.Random(count)
    system = random_ids(rng, system_tokens)
    said = [[random_ids(rng, turn_tokens) for _ in range(turns)] for _ in range(count)]

    async def send(client: TimedClient) -> list[Stream]:
        async def one_agent(lines: Sequence[Ids]) -> list[Stream]:
            history, found = list(system), []
            for line in lines:
                history += line
                answer = await client.timed_stream(history, new_tokens)
                history += answer.token_ids()
                found.append(answer)
            return found

        return [stream for streams in await asyncio.gather(*map(one_agent, said)) for stream in streams]

    about = (
        f"{count} agents, {turns} turns each, {system_tokens} tokens of system prompt shared, {turn_tokens} tokens and "
        f"{new_tokens} new a turn"
    )
    return Work(f"agents-{count}", about, send)


def all_work(quick: bool, device: str) -> list[Work]:
    """What ``bench serve`` measures; on a CPU so little that it ends within minutes."""
    if device == "cpu":
        return [chats(1, 2, 64, 8), chats(4, 8, 64, 8), long_prompt(1024, 4), agents(4, 3, 300, 40, 8)]
    if quick:
        return [
            *(chats(concurrency, max(4, 2 * concurrency), 512, 64) for concurrency in (1, 32)),
            long_prompt(16 * 1024, 16),
            agents(16, 4, 2048, 128, 32),
        ]
    return [
        *(chats(concurrency, max(6, 3 * concurrency), 512, 128) for concurrency in (1, 8, 32, 64)),
        long_prompt(128 * 1024, 32),
        agents(64, 10, 2048, 128, 32),
    ]


def choose_work(only: str, quick: bool, device: str) -> list[Work]:
    """The scenarios whose name contains ``only``.

    Raises:
        ValueError: there is none.
    """
    found = all_work(quick or device == "cpu", device)
    chosen = [work for work in found if only in work.name]
    if not chosen:
        raise ValueError(f"--only {only}: expected a part of one of {', '.join(work.name for work in found)}")
    return chosen
