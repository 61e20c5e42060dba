"""`bench serve` without a server of SGLang: what it reads off a stream, what it computes, in which order it measures."""

import argparse
import asyncio
import contextlib
import io
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from sglang_dsv4.bench import serve_command, serve_report, serve_session, serve_start
from sglang_dsv4.bench.serve_work import agents, all_work, chats, choose_work
from sglang_dsv4.bench.timed_stream import Stream, StreamError, TimedClient, TimedReply
from sglang_dsv4.check.server import OURS, ROUNDED, THEIRS, Side
from sglang_dsv4.cli import main


def event(*token_ids, prompt=10, cached=4):
    meta = {"completion_tokens": len(token_ids), "prompt_tokens": prompt, "cached_tokens": cached}
    return f"data: {json.dumps({'output_ids': token_ids, 'meta_info': meta})}\n\n".encode()


def stream(*pieces):
    return Stream(1.0, list(pieces))


def test_the_time_of_every_token_is_that_of_the_piece_in_which_its_event_ends():
    third = event(5, 6, 7, 8)
    found = stream((1.5, event(5)), (1.6, event(5, 6) + third[:9]), (2.0, third[9:] + b"data: [DONE]\n\n"))
    reply = found.reply()
    assert reply == TimedReply((5, 6, 7, 8), 10, 4, 1.0, ((1.5, 1), (1.6, 2), (2.0, 4)))
    assert reply.first_token_s == 0.5 and reply.gaps_s() == pytest.approx([0.1, 0.2, 0.2])
    assert found.token_ids() == reply.token_ids


def test_an_error_in_a_stream_is_raised():
    for said, pieces in (
        ("expected tokens, got .*full", (event(5), b'data: {"error": {"message": "full"}}\n\n')),
        ("at least one token", (b"data: [DONE]\n\n",)),
    ):
        with pytest.raises(StreamError, match=said):
            stream(*((1.5, piece) for piece in pieces)).reply()


def reply_at(sent_s, *arrivals, prompt=100, cached=0):
    return TimedReply((1,) * arrivals[-1][1], prompt, cached, sent_s, tuple(arrivals))


def test_a_round_is_summed_up():
    numbers = serve_report.summarize([reply_at(0.0, (0.5, 1), (1.0, 2)), reply_at(1.0, (1.2, 1), (1.6, 3), cached=50)])
    assert numbers["output_tokens_per_s"] == pytest.approx(5 / 1.6) and numbers["cached_share"] == 0.25
    assert (numbers["ttft_p50_ms"], numbers["ttft_p99_ms"]) == pytest.approx((350, 497))
    assert (numbers["itl_p50_ms"], numbers["itl_p99_ms"]) == pytest.approx((200, 494))


def taken(**seconds):
    """Rounds of sides that take so long for the first token and for the second."""
    return [
        {"work": "w", "side": side, "round": number, "numbers": serve_report.summarize([reply_at(0.0, (s, 1), (2 * s, 2))])}
        for side, times in seconds.items()
        for number, s in enumerate(times)
    ]


def test_rounds_are_compared_in_pairs():
    """Pairs say 2, 10 / 9 and 5, so 2; medians of each side would say 8.5 / 4. A round without its pair does not count."""
    (row,) = serve_report.rows(taken(ours=(1, 9, 4), sglang=(2, 10, 20, 7)))
    assert (row[OURS]["ttft_p50_ms"], row[THEIRS]["ttft_p50_ms"]) == (4000, 8500)
    better = row["ours_is_better"]
    assert better["ttft_p50_ms"] == pytest.approx({"median": 2, "low": 10 / 9, "high": 5})
    assert better["output_tokens_per_s"] == pytest.approx(better["ttft_p50_ms"])
    (row,) = serve_report.rows(taken(ours=(2, 2), sglang=(1, 1)))
    assert all(value["median"] == pytest.approx(0.5) for value in row["ours_is_better"].values())
    assert serve_report.table([row]).row_count == 3


@pytest.mark.parametrize(("count", "rank"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (15, 3), (40, 13)])
def test_the_interval_holds_the_median_as_often_as_it_says(count, rank):
    """By counting: of all ways in which values can lie about the median, those that the interval covers."""
    values = [float(i * i) for i in range(count)]
    assert serve_report.interval(values[::-1]) == (values[rank], values[-1 - rank])
    below = np.array([math.comb(count, number) / 2**count for number in range(count + 1)])
    assert below[rank + 1 : count - rank].sum() >= 0.95 or count < 6
    assert below[rank + 2 : count - rank - 1].sum() < 0.95, "a narrower one would do"


def sent_to_a_server(work, reply):
    """Send some work to a server whose answers are ``reply(ids)``; its streams, and the prompts that it was sent."""
    asked = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        ids = json.loads(await reader.readexactly(length))["input_ids"]
        asked.append(tuple(ids))
        writer.write(reply(ids))
        await writer.drain()
        writer.close()

    async def send():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, TimedClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
            return await work.send(client)

    return asyncio.run(send()), asked


OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


def test_agents_come_back_with_all_that_was_said():
    streams, asked = sent_to_a_server(agents(3, 4, 20, 5, 2), lambda ids: OK + event(len(ids), 7, prompt=len(ids)))
    assert [stream.reply().prompt_tokens for stream in streams] == [25, 32, 39, 46] * 3
    assert len({ids[:20] for ids in asked}) == 1 and len({ids[:25] for ids in asked}) == 3
    assert all(ids[25:27] == (25, 7) for ids in asked if len(ids) > 25)


def test_chats_send_each_prompt_once_and_a_refusal_is_raised_with_what_the_server_says():
    streams, asked = sent_to_a_server(chats(4, 10, 30, 2), lambda _: OK + event(1))
    assert len(streams) == len(asked) == len(set(asked)) == 10
    with pytest.raises(StreamError, match="expected status 200, got 400.*too long"):
        sent_to_a_server(chats(1, 1, 30, 2), lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\ninput_ids: too long")


def test_every_scenario_is_there():
    names = {device: [work.name for work in all_work(quick=False, device=device)] for device in ("cpu", "cuda")}
    assert names["cuda"] == ["chat-1", "chat-8", "chat-32", "chat-64", "long-131072", "agents-64"]
    assert len(set(names["cpu"])) == 4


def test_the_sides_take_turns_and_take_turns_in_being_first(monkeypatch, tmp_path):
    asked, still = [], []

    @contextlib.contextmanager
    def paused(name):
        still.append(name)
        yield
        still.remove(name)

    async def one_round(client, work):
        asked.append((client, work.name, tuple(still)))
        return serve_report.summarize([reply_at(0.0, (0.5, 1), (1.0, 2))])

    monkeypatch.setattr(serve_session, "send_round", one_round)
    monkeypatch.setattr(serve_session, "TimedClient", contextlib.nullcontext)  # the client is the address
    servers = [SimpleNamespace(side=Side(name, True), url=name, paused=partial(paused, name)) for name in (OURS, THEIRS)]
    monkeypatch.setattr(serve_session, "environment", lambda device: {"device": device})
    (tmp_path / "config.json").write_text("{}")
    args = argparse.Namespace(quick=False, rounds=None, json=tmp_path / "report.json", build_dir=tmp_path)
    session = serve_session.Session(args, tmp_path, "cuda", Console(file=io.StringIO()))
    asyncio.run(session._measure(servers, choose_work("chat-8", False, "cuda")))
    assert {name for _, name, _ in asked} == {"chat-8"}
    clients = [client for client, _, _ in asked]
    assert clients == [OURS, THEIRS, *[OURS, THEIRS, THEIRS, OURS] * 4, OURS, THEIRS]
    assert {(client, *still) for client, _, still in asked[2:]} == {(OURS, THEIRS), (THEIRS, OURS)}
    assert [entry["side"] for entry in json.loads(args.json.read_text())["rounds"]] == clients[2:]


def test_the_second_server_gets_as_many_bytes_as_the_first():
    assert serve_start.same_share(0.2, 80 << 30, 60 << 30) * (60 << 30) == pytest.approx(0.2 * (80 << 30))
    assert serve_start.same_share(0.5, 0, 0) == 0.5
    with pytest.raises(ValueError, match="expected room for as much again"):
        serve_start.same_share(0.5, 80 << 30, 40 << 30)


@pytest.mark.parametrize("tokens", [None, 65536])
def test_sides_start_at_the_same_time_where_the_size_of_their_pools_is_given(monkeypatch, tokens):
    done = []
    monkeypatch.setattr(serve_start, "wait_until_ready", lambda servers: done.append(len(servers)))
    sides = [Side(name, True, ("--x",)) for name in (OURS, THEIRS)]
    enter = lambda side: done.append(side.name) or SimpleNamespace(side=side)  # noqa: E731
    if tokens is None:
        servers = serve_start.start_in_turn(sides, 0.2, "cpu", enter)
    else:
        servers = serve_start.start_at_once(sides, tokens, enter)
    assert done == ([OURS, 1, THEIRS, 1] if tokens is None else [OURS, THEIRS, 2])
    for server in servers:
        assert server.side.options[0] == "--x" and ("65536" in server.side.options) == (tokens is not None)


def test_the_sides_differ_by_the_flag_alone():
    parser = argparse.ArgumentParser()
    serve_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["serve", "--options", "--dtype bfloat16"])
    ours, theirs = serve_command.make_sides(args, "cuda")
    assert (ours.name, ours.is_ours, theirs.name, theirs.is_ours) == (OURS, True, THEIRS, False)
    assert ours.options == theirs.options and "bfloat16" in ours.options
    assert [side.name for side in serve_command.make_sides(args, "cpu")] == [OURS]
    assert serve_command.make_rounded(args, "cuda").name == ROUNDED and serve_command.make_rounded(args, "cpu") is None


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--only", "nothing"], "--only nothing: expected a part of one of chat-1, chat-4, long-1024, agents-4"),
        (["--sides", "mine"], "--sides: expected some of ours,sglang, got mine"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(tmp_path, capsys, options, fault):
    build = tmp_path / "build"
    assert main(["bench", "serve", "--device", "cpu", "--build-dir", str(build), *options]) == 1
    assert fault in " ".join(capsys.readouterr().out.split())
    assert not build.exists()
