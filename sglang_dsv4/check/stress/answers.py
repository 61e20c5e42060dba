"""What came back, read from the replies of SGLang's endpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_dsv4.check.stress.cases import CHAT, GENERATE, Case

# A reply before the first token.
_NOTHING: dict[str, Any] = {
    "output_ids": [],
    "meta_info": {"output_token_logprobs": [], "prompt_tokens": 0, "cached_tokens": 0},
}


@dataclass(frozen=True)
class Answer:
    """One continuation.

    Attributes:
        prompt (int): which of the case's prompts it continues.
        text (str): as it came.
        token_ids (tuple[int, ...] | None): None where the endpoint does not give them.
        logprobs (tuple[float | None, ...] | None): of the tokens, None for one that was lost; None where they were not
            asked for.
        finish (str | None): why it ended; None: it did not.
        prompt_tokens (int): tokens of the prompt.
        cached_tokens (int): of them, from the prefix cache, as far as the endpoint says.
        retractions (int): how often the server sent it back to the queue.
    """

    prompt: int
    text: str
    token_ids: tuple[int, ...] | None
    logprobs: tuple[float | None, ...] | None
    finish: str | None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    retractions: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        case (Case): what was asked.
        status (int): of HTTP.
        answers (tuple[Answer, ...]): in the order of the prompts.
        faults (tuple[str, ...]): what was wrong with the reply itself.
        started_s (float): since the stress test began.
        seconds (float): until the last byte, or until the client left.
        first_s (float | None): until the first token of a stream.
    """

    case: Case
    status: int
    answers: tuple[Answer, ...] = ()
    faults: tuple[str, ...] = ()
    started_s: float = 0.0
    seconds: float = 0.0
    first_s: float | None = None


def request_body(case: Case, rid: str) -> dict[str, Any]:
    """The JSON of a case."""
    if case.invalid is not None:
        return case.invalid
    if case.endpoint == GENERATE:
        one = len(case.prompts) == 1
        sampling = {"temperature": 0.0, "max_new_tokens": case.new_tokens, "ignore_eos": True, "n": case.n}
        if case.stop:
            sampling["stop"] = list(case.stop)
        body = {
            "input_ids": list(case.prompts[0]) if one else [list(p) for p in case.prompts],
            "sampling_params": sampling,
            "return_logprob": True,
            "stream": case.stream,
        }
        if case.top_logprobs:
            body["top_logprobs_num"] = case.top_logprobs
        return {**body, "rid": rid} if one and case.n == 1 else body
    body = {"model": "default", "temperature": 0.0, "max_tokens": case.new_tokens, "ignore_eos": True, "stream": case.stream}
    if case.stream:
        body["stream_options"] = {"include_usage": True}
    if case.stop:
        body["stop"] = list(case.stop)
    if case.endpoint == CHAT:
        return {**body, "messages": [{"role": "user", "content": case.message}]}
    return {**body, "prompt": list(case.prompts[0]), "return_token_ids": True}


def read_native(case: Case, reply: dict[str, Any] | list[dict[str, Any]]) -> tuple[Answer, ...]:
    """Read a reply of ``/generate``.

    Raises:
        KeyError: the reply lacks a field.
    """
    replies = reply if isinstance(reply, list) else [reply]
    return tuple(_native(index // case.n, item) for index, item in enumerate(replies))


def read_native_stream(case: Case, events: Sequence[dict[str, Any]]) -> tuple[Answer, ...]:
    """Read the events of a stream of ``/generate``, each of which holds all so far.

    Raises:
        KeyError: the last lacks a field.
    """
    last = events[-1]
    if _is_aborted_in_queue(last["meta_info"]):
        last = _with_counts(last, events[-2] if len(events) > 1 else _NOTHING)
    return read_native(case, last)


def _is_aborted_in_queue(meta: dict[str, Any]) -> bool:
    """Whether a request was aborted while it waited, at first or after a retraction: SGLang 0.5.17 sends no counts then."""
    return (meta.get("finish_reason") or {}).get("type") == "abort" and "prompt_tokens" not in meta


def _with_counts(aborted: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A reply with the counts of the one before it, and with all its tokens instead of the last alone."""
    pairs = aborted["meta_info"].get("output_token_logprobs") or ()
    num_lost = len(before["output_ids"]) - len(before["meta_info"]["output_token_logprobs"])
    ids = [*before["output_ids"][:num_lost], *(int(token_id) for _, token_id, *_ in pairs)]
    return {**aborted, "output_ids": ids, "meta_info": {**before["meta_info"], **aborted["meta_info"]}}


def _native(prompt: int, reply: dict[str, Any]) -> Answer:
    meta = reply["meta_info"]
    pairs = meta.get("output_token_logprobs") or ()
    token_ids = tuple(int(token_id) for _, token_id, *_ in pairs)
    logprobs: tuple[float | None, ...] = tuple(float(value) for value, *_ in pairs)
    output_ids = tuple(reply["output_ids"])
    # SGLang 0.5.17 loses the first log-probability of a request that it retracts before its first token has come: it
    # counts one as sent that is not there yet. The tokens are whole.
    if int(meta.get("num_retractions", 0)) and output_ids and token_ids == output_ids[1:]:
        token_ids, logprobs = output_ids, (None, *logprobs)
    return Answer(
        prompt,
        reply["text"],
        token_ids,
        logprobs,
        (meta.get("finish_reason") or {}).get("type"),
        int(meta["prompt_tokens"]),
        int(meta["cached_tokens"]),
        int(meta.get("num_retractions", 0)),
    )


def read_openai(reply: dict[str, Any]) -> tuple[Answer, ...]:
    """Read a whole reply of the OpenAI-compatible endpoints.

    Raises:
        KeyError: the reply lacks a field.
    """
    prompt_tokens, cached_tokens = _read_usage(reply)
    answers = []
    for choice in reply["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        ids = choice.get("token_ids")
        answers.append(
            Answer(
                0, text or "", None if ids is None else tuple(ids), None, choice["finish_reason"], prompt_tokens, cached_tokens
            )
        )
    return tuple(answers)


def read_openai_stream(events: Sequence[dict[str, Any]]) -> tuple[Answer, ...]:
    """Put the pieces of a stream together.

    Raises:
        KeyError: an event lacks a field.
    """
    text, ids, finish = "", [], None
    prompt_tokens, cached_tokens = 0, 0
    for event in events:
        if event.get("usage"):
            prompt_tokens, cached_tokens = _read_usage(event)
        for choice in event["choices"]:
            piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
            text += piece or ""
            ids += choice.get("token_ids") or []
            finish = choice.get("finish_reason") or finish
    return (Answer(0, text, tuple(ids) or None, None, finish, prompt_tokens, cached_tokens),)


def _read_usage(reply: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt, and of them from the cache; the latter only with ``--enable-cache-report``."""
    usage = reply.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return int(usage.get("prompt_tokens", 0)), int(details.get("cached_tokens", 0))
