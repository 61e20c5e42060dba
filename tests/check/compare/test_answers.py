"""What a comparison asks, plants, keeps, and judges again."""

import asyncio
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from sglang_dsv4.check.compare.answers import Passes, Run, Scorer, read_answers, write_answers
from sglang_dsv4.check.compare.questions import PLANTED, make_questions, wrong_question
from sglang_dsv4.check.compare.result import judge_kept, kept_runs
from sglang_dsv4.check.reply import Question, Reply, Token
from sglang_dsv4.cli import main

PROMPT = (9, 10, 11)
KINDS = ("cold", "hit", "again")


def answer(*tokens):
    """Of ``(token_id, logprob, best_id, margin)`` each."""
    return Reply(tuple(Token(*token) for token in tokens))


RIGHT = answer((1, -0.5, 1, 0.9), (2, -1.0, 2, 0.05), (3, -0.2, 3, 2.0))
MOVED = answer((1, -0.51, 1, 0.9), *RIGHT.tokens[1:])


def test_scores_are_asked_for_once_and_at_the_same_time():
    asked, running, done = [], [], []

    async def score(prompt_ids, token_ids):
        asked.append(token_ids)
        running.append(len(asked) - len(done))
        await asyncio.sleep(0)
        done.append(token_ids)
        return [token_ids]

    others = [answer((number, -1.0, number, 0.1)) for number in range(5)]
    agreeing = answer((9, -1.0, 9, 0.1))

    async def prepare_and_ask():
        scorer = Scorer(SimpleNamespace(score=score), 2)
        await scorer.prepare([Question(PROMPT, 1)] * 6, [agreeing] * 6, [*others, agreeing])
        return [await scorer(PROMPT, other.token_ids) for other in others]

    assert asyncio.run(prepare_and_ask()) == [[other.token_ids] for other in others]
    assert sorted(asked) == [other.token_ids for other in others]
    assert max(running) == 2


def test_every_server_is_asked_cold_at_hits_and_cold_again_in_another_order():
    done = []

    class Client:
        async def flush(self):
            done.append("flush")

        async def generate(self, prompt_ids, new_tokens):
            done.append(len(prompt_ids))
            return answer((7, -0.5, 7, 0.4))

    questions = [Question((9,) * length, 1) for length in (1, 2, 3, 4, 5)]
    runs = asyncio.run(Passes(questions, 1).run(Client(), "a"))
    assert [run.name for run in runs] == ["a cold", "a hit", "a again"]
    first, order = done[0], done[1:6]
    assert first == "flush" and sorted(order) == [1, 2, 3, 4, 5] != order
    assert done == ["flush", *order, *order, "flush", *order[::-1]]


def test_planted_faults_are_where_they_say():
    prompt = tuple(range(8, 308))
    changed = {
        kind: [
            i
            for i, (a, b) in enumerate(
                zip(prompt, wrong_question(Question(prompt, 4), kind, random.Random(0)).prompt_ids, strict=True)
            )
            if a != b
        ]
        for kind in PLANTED
    }
    assert changed["a token of the window"] == [295]
    assert changed["most of the window"] == list(range(200, 296))
    assert 140 < len(changed["the first page"]) <= 150 and max(changed["the first page"]) < 150
    for kind in PLANTED:
        short = wrong_question(Question((8, 9), 4), kind, random.Random(0)).prompt_ids
        assert len(short) == 2 and short[1] == 9


def test_questions_are_mixed_repeatable_and_share_prefixes():
    questions = make_questions(200, 1500, 0)
    assert questions == make_questions(200, 1500, 0) != make_questions(200, 1500, 1)
    lengths = [len(question.prompt_ids) for question in questions]
    assert min(lengths) < 4 and max(lengths) > 1400 and len(set(lengths)) > 60
    first_pages = [q.prompt_ids[:256] for q in questions if len(q.prompt_ids) > 256]
    assert 10 < len(first_pages) - len(set(first_pages)) < len(first_pages) // 2
    assert {question.new_tokens for question in questions} == {4, 12, 24}


def test_answers_can_be_judged_again_from_the_file(tmp_path):
    questions = make_questions(3, 400, 0)
    runs = [Run("a cold", [RIGHT, answer(), RIGHT]), Run("a hit", [replace(RIGHT, cached_tokens=256)] * 3)]
    where = {"device": "cpu"}
    write_answers(tmp_path / "answers.json", questions, runs, where)
    kept = read_answers(tmp_path / "answers.json")
    assert kept == (questions, {run.name: run for run in runs}, where)


def kept_answers(path, **answers):
    """A file as a comparison keeps it: what each side answered in its three passes."""
    runs = []
    for side, given in answers.items():
        for kind, one in zip(KINDS, given, strict=True):
            runs.append(Run(f"{side}-graph-256 {kind}", [replace(one, cached_tokens=2 if kind == "hit" else 0)]))
    write_answers(path, [Question(PROMPT, 3)], runs, {"gpu": "a GPU"})
    return path


def judge_again(file):
    """The sides and passes that have faults."""
    runs, where = kept_runs(file)
    result = asyncio.run(judge_kept(runs, file.parent, 0, "cpu", print))
    assert where == {"gpu": "a GPU"}
    assert set(result.verdicts) == {f"ours-graph-256 {kind}" for kind in KINDS}
    assert bool(result.faults) == any(verdict["num_faults"] for verdict in result.verdicts.values())
    return [name.split()[1] for name, verdict in result.verdicts.items() if verdict["num_faults"]]


def test_kept_answers_are_judged_again_without_servers(tmp_path):
    """Nothing is known to round, so the smallest difference is a fault; other rows allow what those rows do."""
    file = tmp_path / "answers.json"
    right, moved_hit, moved = (RIGHT,) * 3, (RIGHT, MOVED, RIGHT), (MOVED,) * 3
    assert judge_again(kept_answers(file, sglang=right, ours=right)) == []
    assert judge_again(kept_answers(file, sglang=right, ours=moved_hit)) == ["hit"]
    assert judge_again(kept_answers(file, sglang=right, ours=moved)) == list(KINDS)
    assert judge_again(kept_answers(file, sglang=right, ours=moved, **{"ours-fp8_584": right})) == []


def test_a_pass_that_should_hit_the_prefix_cache_and_did_not_is_a_fault(tmp_path):
    runs, _ = kept_runs(kept_answers(tmp_path / "answers.json", sglang=(RIGHT,) * 3, ours=(RIGHT,) * 3))
    runs.judged[1] = replace(runs.judged[1], answers=[RIGHT])
    result = asyncio.run(judge_kept(runs, tmp_path, 0, "cpu", print))
    assert result.faults == ["ours-graph-256 hit: expected prefix hits, got none"]


@pytest.mark.parametrize("backend", ["sglang", "ours"])
def test_kept_answers_of_one_backend_alone_cannot_be_judged(tmp_path, backend):
    file = kept_answers(tmp_path / "answers.json", **{backend: (RIGHT,) * 3})
    with pytest.raises(ValueError, match="expected answers of"):
        kept_runs(file)


@pytest.mark.parametrize("content", ["{}", "[]", '{"questions": []}', "no JSON"])
def test_another_file_than_kept_answers_is_refused_before_anything_is_judged(tmp_path, content, capsys):
    file = tmp_path / "other.json"
    file.write_text(content)
    assert main(["compare", "--device", "cpu", "--build-dir", str(tmp_path / "build"), "--answers", str(file)]) == 1
    assert f"{file.name}: expected answers that" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "build").exists()
