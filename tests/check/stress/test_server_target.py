"""The client against a server of a few lines: what it sends, and what it makes of whole, cut and refused replies."""

import asyncio
import json

import httpx
import pytest

from sglang_dsv4.check.client import GENERATE
from sglang_dsv4.check.reply import Question
from sglang_dsv4.check.stress.cases import CHAT, COMPLETIONS, EDGES, INVALID, NUM_TURNS, Case, make_case
from sglang_dsv4.check.stress.load import Load, drive
from sglang_dsv4.check.stress.replies import Outcome
from sglang_dsv4.check.stress.server_target import ServerTarget

PROMPT = (9, 10, 11)


def native(text, ids, finish=None):
    return {
        "text": text,
        "output_ids": ids,
        "meta_info": {
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "finish_reason": finish and {"type": finish},
            "prompt_tokens": 3,
            "cached_tokens": 0,
            "num_retractions": 1,
        },
    }


WHOLE = [native("a", [5]), native("ab", [5, 6]), native("abc", [5, 6, 7], "length")]


def sse(events, end="data: [DONE]\n\n"):
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end


def target(handle):
    return ServerTarget("http://server", transport=httpx.MockTransport(handle))


def send(case, content, status=200):
    """The outcome of one case, and the bodies that the server got."""
    bodies = []

    def handle(request):
        bodies.append((request.url.path, json.loads(request.content)))
        return httpx.Response(status, text=content, headers={"content-type": "text/event-stream"})

    return asyncio.run(target(handle).send(case)), bodies


def case(endpoint=GENERATE, **options):
    return Case(3, "short", endpoint, (PROMPT,), new_tokens=3, **options)


def test_a_stream_is_read_to_its_end():
    outcome, ((path, body),) = send(case(stream=True), sse(WHOLE))
    (answer,) = outcome.answers
    assert outcome.faults == () and outcome.first_s is not None
    assert (answer.text, answer.token_ids, answer.finish) == ("abc", (5, 6, 7), "length")
    assert answer.retractions == 1
    assert path == GENERATE and body["stream"] and body["sampling_params"]["temperature"] == 0.0


@pytest.mark.parametrize(
    ("events", "end", "message"),
    [
        (WHOLE[:2], "", "the stream ended after 2 events"),
        ([], "", "the stream ended after 0 events"),
        ([WHOLE[1], native("xb", [5, 6], "length")], "data: [DONE]\n\n", "after 'ab'"),
        ([{"error": {"message": "no memory"}}], "data: [DONE]\n\n", "no memory"),
        (WHOLE, "data: {\n\n", "JSONDecodeError"),
    ],
)
def test_a_stream_that_is_cut_or_takes_text_back_is_a_fault(events, end, message):
    outcome, _ = send(case(stream=True), sse(events, end))
    assert message in " ".join(outcome.faults)


def test_a_character_that_is_completed_later_is_no_fault():
    events = [native("a\ufffd", [5]), native("aé", [5, 6], "length")]
    assert send(case(stream=True), sse(events))[0].faults == ()


def test_a_client_that_leaves_stops_listening_and_one_that_aborts_says_so():
    left, bodies = send(case(stream=True, leave_after=1), sse(WHOLE))
    assert left.faults == () and left.answers[0].text == "a" and len(bodies) == 1
    aborted, bodies = send(case(stream=True, leave_after=1, abort=True), sse(WHOLE))
    assert aborted.faults == () and aborted.answers[0].text == "abc"
    assert bodies[1] == ("/abort_request", {"rid": bodies[0][1]["rid"]})


def aborted_in_the_queue(finish, lost=0):
    """What SGLang 0.5.17 sends when a request that had answered, and was retracted, is aborted while it waits."""
    reply = native("abc", [7], finish)
    reply["meta_info"] = {
        "id": "stress-3",
        "finish_reason": {"type": finish, "message": "Abort in waiting queue"},
        "output_token_logprobs": [[-0.5, token, None] for token in (5, 6, 7)[lost:]],
        "completion_tokens": 3,
    }
    return reply


@pytest.mark.parametrize("lost", [0, 1])
def test_an_abort_in_the_queue_leaves_out_counts(lost):
    before = native("ab", [5, 6])
    del before["meta_info"]["output_token_logprobs"][:lost]
    left = case(stream=True, leave_after=2, abort=True)
    outcome, _ = send(left, sse([WHOLE[0], before, aborted_in_the_queue("abort", lost)]))
    (answer,) = outcome.answers
    assert outcome.faults == () and answer.finish == "abort" and answer.text == "abc"
    assert answer.token_ids == (5, 6, 7)
    assert [token.logprob for token in answer.tokens] == [None] * lost + [-0.5] * (3 - lost)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.retractions) == (3, 0, 1)
    # The twins: any other end must have its counts, and a loss that no event before shows stays one.
    outcome, _ = send(left, sse([WHOLE[0], before, aborted_in_the_queue("length", lost)]))
    assert "prompt_tokens" in " ".join(outcome.faults)
    (answer,) = send(left, sse([*WHOLE[:2], aborted_in_the_queue("abort", 1)]))[0].answers
    assert answer.token_ids == (6, 7)


def test_an_abort_before_the_first_token_is_an_empty_answer():
    reply = aborted_in_the_queue("abort", lost=3) | {"text": "", "output_ids": []}
    (answer,) = send(case(stream=True, leave_after=1, abort=True), sse([reply]))[0].answers
    assert (answer.text, answer.token_ids, answer.finish) == ("", (), "abort")
    assert (answer.prompt_tokens, answer.cached_tokens, answer.retractions) == (0, 0, 0)


def test_a_slow_client_asks_for_much_and_reads_all():
    outcome, ((_, body),) = send(case(stream=True, pause_s=0.2, top_logprobs=50), sse(WHOLE))
    assert outcome.answers[0].token_ids == (5, 6, 7) and body["top_logprobs_num"] == 50
    assert outcome.seconds >= 0.2 > outcome.first_s


def test_many_prompts_and_many_continuations():
    replies = json.dumps([WHOLE[2]] * 4)
    burst = Case(0, "burst", GENERATE, (PROMPT, (9,)), new_tokens=3, n=2)
    outcome, ((_, body),) = send(burst, replies)
    assert len(outcome.answers) == 4
    assert body["input_ids"] == [[9, 10, 11], [9]] and body["sampling_params"]["n"] == 2


def test_openai_replies_whole_and_streamed():
    choice = {"text": "abc", "token_ids": [5, 6, 7], "finish_reason": "stop"}
    whole = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3}})
    outcome, ((_, body),) = send(case(COMPLETIONS, stop=("x",)), whole)
    assert outcome.answers[0].token_ids == (5, 6, 7) and body["stop"] == ["x"]
    assert "stream_options" not in body
    pieces = [
        {"choices": [{"text": "ab", "token_ids": [5, 6], "finish_reason": None}]},
        {"choices": [{"text": "c", "token_ids": [7], "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}},
    ]
    outcome, ((_, body),) = send(case(COMPLETIONS, stream=True), sse(pieces))
    (answer,) = outcome.answers
    assert (answer.text, answer.token_ids, answer.finish) == ("abc", (5, 6, 7), "length")
    assert (answer.prompt_tokens, answer.cached_tokens) == (3, 2)
    assert body["stream_options"] == {"include_usage": True}
    deltas = [({"role": "assistant", "content": ""}, None), ({"content": "yo"}, "length")]
    pieces = [{"choices": [{"delta": delta, "finish_reason": finish}]} for delta, finish in deltas]
    outcome, ((_, body),) = send(
        Case(0, "chat", CHAT, message="hi", new_tokens=2, stream=True), sse([*pieces, {"choices": []}])
    )
    (answer,) = outcome.answers
    assert (answer.text, answer.tokens, answer.finish) == ("yo", None, "length")
    assert body["messages"] == [{"role": "user", "content": "hi"}]


def test_a_status_is_kept_and_no_reply_is_a_fault():
    assert send(case(), "{}", status=503)[0].status == 503
    assert "KeyError" in send(case(), "{}")[0].faults[0]

    def refuse(request):
        raise httpx.ConnectError("refused", request=request)

    outcome = asyncio.run(target(refuse).send(case()))
    assert outcome.status == 0 and "ConnectError: refused" in outcome.faults[0]


def test_a_question_is_asked_alone_with_margins_on_a_cold_cache():
    asked = []

    def handle(request):
        asked.append((request.url.path, json.loads(request.content or "null")))
        cached = 256 if len(asked) > 2 else 0
        best = [[[-0.5, token, None], [-1.5, 4, None]] for token in (5, 6)]
        reply = native("ab", [5, 6], "stop")
        reply["meta_info"] |= {"output_top_logprobs": best, "cached_tokens": cached}
        return httpx.Response(200, json=reply)

    question = Question(PROMPT, 3, ("x",))
    reply = asyncio.run(target(handle).ask(question))
    assert [path for path, _ in asked] == ["/flush_cache", GENERATE]
    sampling = asked[1][1]["sampling_params"]
    assert (sampling["temperature"], sampling["max_new_tokens"], sampling["stop"]) == (0.0, 3, ["x"])
    assert [token.margin for token in reply.tokens] == [1.0, 1.0] and reply.finish == "stop"
    with pytest.raises(ValueError, match="cold cache, got 256"):
        asyncio.run(target(handle).ask(question))


def test_cases_are_a_function_of_seed_and_number():
    cases = [make_case(7, number) for number in range(3000)]
    assert cases == [make_case(7, number) for number in range(3000)]
    assert cases != [make_case(8, number) for number in range(3000)]
    kinds = {c.workload for c in cases}
    assert kinds == {"short", "chat", "edge", "long", "agent", "branch", "stop", "leave", "abort", "slow", "burst", "invalid"}
    edges = {len(c.prompts[0]) for c in cases if c.workload == "edge"}
    assert edges == {edge + by for edge in EDGES for by in range(-2, 3)}
    agents = {c.prompts[0] for c in cases if c.workload == "agent"}
    longer = [a for a in agents if any(a != b and a[: len(b)] == b for b in agents)]
    assert len(longer) >= len(agents) * (NUM_TURNS - 1) // NUM_TURNS
    assert {str(c.invalid) for c in cases if c.invalid} == {str(body) for _, body in INVALID}
    assert {c.endpoint for c in cases} == {GENERATE, COMPLETIONS, CHAT}


@pytest.mark.parametrize("requests", [10, 2])
def test_as_many_at_once_as_asked_for(requests):
    running, most, steps = set(), [], []

    async def answer(sent):
        running.add(sent.number)
        most.append(len(running))
        await asyncio.sleep(0.001)
        running.remove(sent.number)
        return Outcome(sent, 200)

    load = Load(seed=0, first=5, requests=requests, minutes=0.0, concurrency=3)
    outcomes = asyncio.run(drive(answer, load, steps.append, is_ended=lambda: False))
    assert [outcome.case.number for outcome in outcomes] == list(range(5, 5 + requests))
    assert len(steps) == requests and max(most) == min(3, requests)
    assert asyncio.run(drive(answer, load, steps.append, lambda: True)) == []
