"""Bodies for SGLang's endpoints, and what their replies amount to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_dsv4.check.client import GENERATE
from sglang_dsv4.check.reply import Reply, Token, generate_body, read_reply
from sglang_dsv4.check.stress.cases import CHAT, Case

# A reply before the first token.
_NOTHING: dict[str, Any] = {
    "output_ids": [],
    "meta_info": {"output_token_logprobs": [], "prompt_tokens": 0, "cached_tokens": 0},
}


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        case (Case): what was asked.
        status (int): of HTTP; 0: no reply.
        answers (tuple[Reply, ...]): in the order of the prompts, ``case.n`` of each.
        faults (tuple[str, ...]): what was wrong with the reply itself.
        started_s (float): since the stress test began.
        seconds (float): until the last byte, or until the client left.
        first_s (float | None): until the first token of a stream.
    """

    case: Case
    status: int
    answers: tuple[Reply, ...] = ()
    faults: tuple[str, ...] = ()
    started_s: float = 0.0
    seconds: float = 0.0
    first_s: float | None = None


def request_body(case: Case, rid: str) -> dict[str, Any]:
    """The JSON of a case."""
    if case.invalid is not None:
        return case.invalid
    stop = {"stop": list(case.stop)} if case.stop else {}
    if case.endpoint == GENERATE:
        one = len(case.prompts) == 1
        body = generate_body((), case.new_tokens, stream=case.stream, top_logprobs_num=case.top_logprobs)
        body["input_ids"] = list(case.prompts[0]) if one else [list(prompt) for prompt in case.prompts]
        body["sampling_params"] |= {"n": case.n, **stop}
        return {**body, "rid": rid} if one and case.n == 1 else body
    body = {"model": "default", "temperature": 0.0, "max_tokens": case.new_tokens, "ignore_eos": True, "stream": case.stream}
    if case.stream:
        body["stream_options"] = {"include_usage": True}
    if case.endpoint == CHAT:
        return {**body, **stop, "messages": [{"role": "user", "content": case.message}]}
    return {**body, **stop, "prompt": list(case.prompts[0]), "return_token_ids": True}


def read_whole(case: Case, reply: Any) -> tuple[Reply, ...]:
    """Read a reply that is no stream.

    Raises:
        KeyError: a field is missing.
    """
    if case.endpoint == GENERATE:
        return tuple(map(read_reply, reply if isinstance(reply, list) else [reply]))
    usage = _usage(reply)
    return tuple(
        Reply(
            _tokens(choice.get("token_ids")),
            (choice["message"]["content"] if "message" in choice else choice["text"]) or "",
            choice["finish_reason"],
            *usage,
        )
        for choice in reply["choices"]
    )


def read_stream(case: Case, events: Sequence[dict[str, Any]], is_done: bool) -> tuple[tuple[Reply, ...], list[str]]:
    """What the events of a stream amount to, and what is wrong with them as a stream.

    Each native event holds all the text so far; it may only grow, except for a last character with missing bytes.

    Raises:
        KeyError: an event lacks a field.
    """
    errors = [event["error"] for event in events if "error" in event]
    if errors:
        return (), [f"the stream reports: {errors[0]}"]
    faults = []
    if not is_done and (case.leave_after is None or case.abort):
        faults.append(f"the stream ended after {len(events)} events, without `[DONE]`")
    if not events:
        return (), faults
    if case.endpoint != GENERATE:
        return _joined(events), faults
    shown = ""
    for index, event in enumerate(events):
        if not event["text"].startswith(shown.rstrip("\ufffd")):
            faults.append(f"event {index} of the stream has the text {event['text']!r}, after {shown!r}")
        shown = event["text"]
    last = events[-1]
    if _is_aborted_in_queue(last["meta_info"]):
        last = _with_counts(last, events[-2] if len(events) > 1 else _NOTHING)
    return (read_reply(last),), faults


def _is_aborted_in_queue(meta: dict[str, Any]) -> bool:
    """Whether a request was aborted while it waited, at first or after a retraction: SGLang 0.5.17 then sends no counts."""
    return (meta.get("finish_reason") or {}).get("type") == "abort" and "prompt_tokens" not in meta


def _with_counts(aborted: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A reply with the counts of the event before it, and with all its tokens instead of the last alone."""
    pairs = aborted["meta_info"].get("output_token_logprobs") or ()
    num_lost = len(before["output_ids"]) - len(before["meta_info"]["output_token_logprobs"])
    ids = [*before["output_ids"][:num_lost], *(int(token_id) for _, token_id, *_ in pairs)]
    meta = {**before["meta_info"], **aborted["meta_info"]}
    # Of the event before, which has fewer.
    meta.pop("output_top_logprobs", None)
    return {**aborted, "output_ids": ids, "meta_info": meta}


def _joined(events: Sequence[dict[str, Any]]) -> tuple[Reply, ...]:
    """The pieces of an OpenAI-compatible stream, put together."""
    text, ids, finish, usage = "", [], None, (0, 0)
    for event in events:
        if event.get("usage"):
            usage = _usage(event)
        for choice in event["choices"]:
            text += (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
            ids += choice.get("token_ids") or []
            finish = choice.get("finish_reason") or finish
    return (Reply(_tokens(ids or None), text, finish, *usage),)


def _tokens(token_ids: Sequence[int] | None) -> tuple[Token, ...] | None:
    return None if token_ids is None else tuple(map(Token, token_ids))


def _usage(reply: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt, and how many of them came from the cache; the latter only with ``--enable-cache-report``."""
    usage = reply.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return int(usage.get("prompt_tokens", 0)), int(details.get("cached_tokens", 0))
