"""What a comparison lets pass, and what it must not."""

import asyncio
import random

import pytest

from sglang_dsv4.check.compare import ask
from sglang_dsv4.check.compare.ask import Answer, Question, Token, make_questions, read_answer
from sglang_dsv4.check.compare.judge import Spread, Verdict, judge, moved, own_rounding, spread_of
from sglang_dsv4.check.compare.runs import Passes, Run, read_answers, write_answers
from sglang_dsv4.check.compare.session import PLANTED, wrong_question
from sglang_dsv4.check.compare.verdicts import bound_of, judge_kept, kept_runs
from sglang_dsv4.cli import main

BOUND = 0.1
PROMPT = (9, 10, 11)


def answer(*tokens):
    """Of ``(token_id, logprob, best_id, margin)`` each."""
    return Answer(tuple(Token(*token) for token in tokens), 0)


RIGHT = answer((1, -0.5, 1, 0.9), (2, -1.0, 2, 0.05), (3, -0.2, 3, 2.0))


def judged(got, scored=None, wanted=RIGHT):
    """The verdict on one answer; ``scored`` is what the reference says along its tokens, asked for where they part."""

    async def score(prompt_ids, token_ids):
        assert (prompt_ids, token_ids) == (PROMPT, got.token_ids) and scored is not None
        return list(scored.tokens)

    verdict = Verdict()
    question = Question(PROMPT, len(wanted.tokens))
    asyncio.run(judge(verdict, "x", question, wanted, got, BOUND, score))
    return verdict


def test_equal_answers_pass():
    verdict = judged(answer((1, -0.55, 1, 0.9), (2, -1.05, 2, 0.01), (3, -0.2, 3, 2.0)))
    assert not verdict.faults
    assert (verdict.identical, verdict.partings, verdict.tokens, verdict.certain) == (1, 0, 3, 2)
    assert verdict.largest == pytest.approx(0.05)


def test_a_log_probability_that_is_too_far_away_is_a_fault():
    verdict = judged(answer((1, -0.65, 1, 0.9), (2, -1.0, 2, 0.05), (3, -0.2, 3, 2.0)))
    assert [fault[:10] for fault in verdict.faults] == ["x: token 0"]


def test_another_token_at_a_close_call_passes_and_what_follows_is_scored():
    got = answer((1, -0.5, 1, 0.9), (7, -1.02, 7, 0.02), (8, -0.3, 8, 1.0))
    along = answer((1, -0.5, 1, 0.9), (7, -1.05, 2, 0.05), (8, -0.35, 8, 1.0))
    verdict = judged(got, along)
    assert not verdict.faults
    assert (verdict.identical, verdict.partings, verdict.tokens) == (0, 1, 3)
    # The twin: behind the parting the reference is sure of another token.
    astray = answer(*[(t.token_id, t.logprob, t.best_id, t.margin) for t in along.tokens[:2]], (8, -1.35, 5, 1.0))
    faults = judged(got, astray).faults
    assert len(faults) == 2 and all(fault.startswith("x: token 2") for fault in faults)


def test_another_token_where_the_reference_is_certain_is_a_fault():
    got = answer((7, -1.4, 7, 0.1), (2, -1.0, 2, 0.05), (3, -0.2, 3, 2.0))
    along = answer((7, -1.4, 1, 0.9), (2, -1.0, 2, 0.05), (3, -0.2, 3, 2.0))
    (fault,) = judged(got, along).faults
    assert fault == "x: token 0: expected 1, which is ahead by 0.9, got 7"


def test_a_short_answer_is_a_fault():
    assert judged(answer((1, -0.5, 1, 0.9))).faults == ["x: expected 3 tokens, got 1"]


def unscored(got):
    """The verdict on one answer where no server can be asked for scores."""
    verdict = Verdict()
    asyncio.run(judge(verdict, "x", Question(PROMPT, 3), RIGHT, got, BOUND, None))
    return verdict


def test_without_scores_answers_are_compared_up_to_where_they_part():
    verdict = unscored(answer((1, -0.55, 1, 0.9), (7, -1.02, 7, 0.02), (8, -9.0, 8, 1.0)))
    assert not verdict.faults and verdict.partings == 1
    assert (verdict.tokens, verdict.uncompared) == (1, 2)
    assert verdict.largest == pytest.approx(0.05)


def test_without_scores_another_token_than_a_certain_one_is_a_fault():
    verdict = unscored(answer((5, -0.5, 5, 0.9), (2, -1.0, 2, 0.05), (3, -0.2, 3, 2.0)))
    assert [fault[:25] for fault in verdict.faults] == ["x: token 0: expected 1, w"]
    assert (verdict.tokens, verdict.uncompared) == (0, 3)


def test_own_rounding_is_the_largest_difference_of_any_way_up_to_where_ways_part():
    moves = answer((1, -0.52, 1, 0.9), (5, -9.0, 5, 0.05), (3, -9.0, 3, 2.0))
    assert moved(RIGHT.tokens, moves.tokens) == pytest.approx([0.02])
    scores = {0: list(answer((1, -0.5, 1, 0.9), (2, -1.03, 2, 0.05), (3, -0.2, 3, 2)).tokens)}
    assert own_rounding([[RIGHT], [moves]], {}).largest == pytest.approx(0.02)
    assert own_rounding([[RIGHT], [moves]], scores).largest == pytest.approx(0.03)


def test_a_bound_is_twice_the_reference_s_distance_from_itself_or_from_exact_arithmetic():
    moves = answer((1, -0.5, 1, 0.9), (2, -1.06, 2, 0.05), (3, -0.2, 3, 2.0))
    reference = [Run("theirs cold", [RIGHT]), Run("theirs hit", [moves])]
    judged = [Run("ours cold", [RIGHT])]
    alone = bound_of(reference, judged, None, {}, Spread())
    assert alone["bound"] == pytest.approx(0.12)
    assert alone["typical_bound"] == pytest.approx(2 * 0.06 / 3**0.5)
    exact = bound_of(reference, judged, None, {}, Spread(0.2, 0.01))
    assert exact["bound"] == pytest.approx(0.4)
    assert exact["typical_bound"] == alone["typical_bound"]
    rows = bound_of(reference, judged, [Run("rounded cold", [moves])], {}, Spread())
    assert rows["bound"] == pytest.approx(0.24)
    assert rows["typical_bound"] == pytest.approx(2 * alone["typical_bound"])


def test_what_a_run_is_away_as_a_rule():
    verdict = judged(answer((1, -0.53, 1, 0.9), (2, -1.0, 2, 0.05), (3, -0.16, 3, 2.0)))
    assert verdict.typical == pytest.approx((0.03**2 + 0.04**2) ** 0.5 / 3**0.5)
    assert spread_of([]) == Spread() and spread_of([-3.0, 4.0]) == Spread(4.0, 12.5**0.5)


def test_scores_are_asked_for_once_and_at_the_same_time(monkeypatch):
    asked, running = [], []

    async def score(client, prompt_ids, token_ids):
        asked.append(token_ids)
        running.append(len(asked) - len(done))
        await asyncio.sleep(0)
        done.append(token_ids)
        return [token_ids]

    done = []
    monkeypatch.setattr(ask, "score", score)
    others = [answer((number, -1.0, number, 0.1)) for number in range(5)]
    questions = [Question(PROMPT, 1)] * 6

    async def prepare_and_ask():
        scorer = ask.Scorer(None, 2)
        await scorer.prepare(questions, [answer((9, -1.0, 9, 0.1))] * 6, [*others, answer((9, -1.0, 9, 0.1))])
        return [await scorer(PROMPT, other.token_ids) for other in others]

    assert asyncio.run(prepare_and_ask()) == [[other.token_ids] for other in others]
    assert sorted(asked) == [other.token_ids for other in others]  # not of the answer that agrees
    assert max(running) == 2


def test_every_server_is_asked_cold_at_hits_and_cold_again_in_another_order():
    done = []

    class Client:
        async def flush(self):
            done.append("flush")

        async def post(self, body):
            done.append(len(body["input_ids"]))
            chosen = [[-0.5, 7, None]]
            return {
                "meta_info": {
                    "output_token_logprobs": chosen,
                    "output_top_logprobs": [[[-0.5, 7, None], [-0.9, 8, None]]],
                    "completion_tokens": 1,
                    "cached_tokens": 0,
                }
            }

    questions = [Question((9,) * length, 1) for length in (1, 2, 3, 4, 5)]
    runs = asyncio.run(Passes(questions, 1).run(Client(), "a"))
    assert [run.name for run in runs] == ["a cold", "a hit", "a again"]
    (first, order) = (done[0], done[1:6])
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
    runs = [Run("a cold", [RIGHT, answer(), RIGHT]), Run("a hit", [Answer(RIGHT.tokens, 256)] * 3)]
    where = {"device": "cpu"}
    write_answers(tmp_path / "answers.json", questions, runs, where)
    kept = read_answers(tmp_path / "answers.json")
    assert kept == (questions, {run.name: run for run in runs}, where)


def test_an_answer_without_all_its_log_probabilities_is_refused():
    rng = random.Random(0)
    chosen = [[-rng.random(), token, None] for token in (5, 6)]
    top = [[[value, token, None], [value - 0.5, 99, None]] for value, token, _ in chosen]
    meta = {"output_token_logprobs": chosen, "output_top_logprobs": top, "completion_tokens": 2, "cached_tokens": 7}
    found = read_answer({"meta_info": meta})
    assert found.token_ids == (5, 6) and found.cached_tokens == 7
    assert found.tokens[0].margin == pytest.approx(0.5) and found.tokens[0].best_id == 5
    with pytest.raises(ValueError, match="expected 3 log-probabilities, got 2 and 2"):
        read_answer({"meta_info": {**meta, "completion_tokens": 3}})


def kept_answers(path, ours, backends=("sglang", "ours")):
    """A file as a comparison keeps it, in which ours answered a question like this."""
    given = {"sglang": [RIGHT] * 3, "ours": [RIGHT, ours, RIGHT]}
    runs = []
    for backend in backends:
        for kind, one in zip(("cold", "hit", "again"), given[backend], strict=True):
            cached = 2 if kind == "hit" else 0
            runs.append(Run(f"{backend}-graph-256 {kind}", [Answer(one.tokens, cached)]))
    write_answers(path, [Question(PROMPT, 3)], runs, {"gpu": "a GPU"})
    return path


def test_kept_answers_are_judged_again_without_servers(tmp_path):
    file = kept_answers(tmp_path / "answers.json", RIGHT)
    runs, where = kept_runs(file)
    result = asyncio.run(judge_kept(runs, tmp_path, 0, "cpu", print))
    assert where == {"gpu": "a GPU"} and not result.faults
    assert set(result.verdicts) == {f"ours-graph-256 {kind}" for kind in ("cold", "hit", "again")}
    # The twin: nothing is known to round, so the smallest difference is a fault.
    moved_hit = answer((1, -0.51, 1, 0.9), (2, -1.0, 2, 0.05), (3, -0.2, 3, 2.0))
    runs, _ = kept_runs(kept_answers(file, moved_hit))
    result = asyncio.run(judge_kept(runs, tmp_path, 0, "cpu", print))
    assert result.faults and all("ours-graph-256 hit" in fault for fault in result.faults)


def test_kept_answers_with_other_rows_allow_what_those_rows_do(tmp_path):
    """Ours with SGLang's rows is no judged run; without it the same difference is a fault."""
    moved = answer((1, -0.51, 1, 0.9), (2, -1.0, 2, 0.05), (3, -0.2, 3, 2.0))
    for sides, num_faults in ((("sglang", "ours-fp8_584", "ours"), 0), (("sglang", "ours"), 3)):
        runs = [
            Run(f"{side}-graph-256 {kind}", [Answer((moved if side == "ours" else RIGHT).tokens, 2)])
            for side in sides
            for kind in ("cold", "hit", "again")
        ]
        write_answers(tmp_path / "answers.json", [Question(PROMPT, 3)], runs, {})
        kept, _ = kept_runs(tmp_path / "answers.json")
        result = asyncio.run(judge_kept(kept, tmp_path, 0, "cpu", print))
        assert set(result.verdicts) == {f"ours-graph-256 {k}" for k in ("cold", "hit", "again")}
        assert sum(verdict["num_faults"] > 0 for verdict in result.verdicts.values()) == num_faults


@pytest.mark.parametrize("backend", ["sglang", "ours"])
def test_kept_answers_of_one_backend_alone_cannot_be_judged(tmp_path, backend):
    file = kept_answers(tmp_path / "answers.json", RIGHT, (backend,))
    with pytest.raises(ValueError, match="expected answers of"):
        kept_runs(file)


@pytest.mark.parametrize("content", ["{}", "[]", '{"questions": []}', "no JSON"])
def test_another_file_than_kept_answers_is_refused_before_anything_is_judged(tmp_path, content, capsys):
    file = tmp_path / "other.json"
    file.write_text(content)
    (tmp_path / "config.json").write_text("{}")
    arguments = ["compare", "--device", "cpu", "--model", str(tmp_path), "--answers"]
    assert main([*arguments, str(file)]) == 1
    assert f"{file.name}: expected answers that" in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, str(tmp_path / "nowhere")]) == 1
    assert "expected a file, got none" in " ".join(capsys.readouterr().out.split())
