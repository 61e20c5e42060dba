"""Asks for every distinct request once more, alone and on a cold cache, and judges all its answers."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

from sglang_dsv4.check.judge import Comparison, Verdict, compare_reply
from sglang_dsv4.check.reply import Ids, Question, Reply
from sglang_dsv4.check.stress.cases import CHAT
from sglang_dsv4.check.stress.replies import Outcome

Ask = Callable[[Question], Awaitable[Reply]]
Tokenize = Callable[[str], Awaitable[Ids]]


class Judge:
    """Compares outcomes with references, which it keeps.

    Args:
        ask (Ask): answers a question alone on a cold cache.
        tokenize (Tokenize): the tokens of a chat.
        bound (float): largest difference of a log-probability between two right runs; it may be set until the first answer
            is judged.

    Attributes:
        verdict (Verdict): of all answers. ``partings``: answers that diverged at a near-tie and were compared anew from
            there; ``uncompared``: texts without tokens that differ behind one.
        mismatches (list[tuple[Outcome, str]]): everything wrong, with the outcome it belongs to.
    """

    def __init__(self, ask: Ask, tokenize: Tokenize, bound: float = 0.0) -> None:
        self.bound = bound
        self.verdict = Verdict()
        self.mismatches: list[tuple[Outcome, str]] = []
        self._ask = ask
        self._tokenize = tokenize
        self._references: dict[Question, Reply] = {}
        self._chats: dict[str, Ids] = {}

    @property
    def num_references(self) -> int:
        """Requests asked for alone so far."""
        return len(self._references)

    async def add(self, outcome: Outcome) -> list[str]:
        """Judge one outcome; its faults, which `mismatches` then has too."""
        faults = outcome_faults(outcome)
        if not faults and outcome.case.invalid is None:
            for index, answer in enumerate(outcome.answers):
                self.verdict.answers += 1
                question = await self.question(outcome, index)
                faults += await self._judge_answer(question, answer, is_whole=outcome.case.leave_after is None)
        self.mismatches += [(outcome, fault) for fault in faults]
        return faults

    async def reference(self, question: Question) -> Reply:
        """The answer to a question alone; asked for once."""
        if question not in self._references:
            self._references[question] = await self._ask(question)
        return self._references[question]

    async def question(self, outcome: Outcome, index: int) -> Question:
        """What answer ``index`` answers."""
        case = outcome.case
        if case.endpoint != CHAT:
            return Question(case.prompts[index // case.n], case.new_tokens, case.stop)
        if case.message not in self._chats:
            self._chats[case.message] = await self._tokenize(case.message)
        return Question(self._chats[case.message], case.new_tokens, case.stop)

    async def _judge_answer(self, question: Question, answer: Reply, *, is_whole: bool) -> tuple[str, ...]:
        found = await self._compare(question, answer, await self.reference(question), is_whole)
        while not found.faults and found.parting is not None:
            if answer.tokens is None:
                self.verdict.uncompared += 1
                break
            self.verdict.partings += 1
            question, answer = _rest(question, answer, found.parting)
            if question.new_tokens == 0 or not answer.tokens:
                break
            reference = await self.reference(question)
            # The text of the rest is another; the tokens say all.
            found = await self._compare(question, replace(answer, text=reference.text), reference, is_whole)
        return found.faults

    async def _compare(self, question: Question, answer: Reply, reference: Reply, is_whole: bool) -> Comparison:
        found = compare_reply(answer, reference, self.bound, is_whole=is_whole)
        self.verdict.add(found, str(question.prompt_ids[:4]))
        return found


def outcome_faults(outcome: Outcome) -> list[str]:
    """What is wrong with an outcome before any answer is compared."""
    case, faults = outcome.case, list(outcome.faults)
    if case.invalid is not None:
        if not 400 <= outcome.status < 500:
            faults.append(f"expected the body to be refused, got status {outcome.status}")
        return faults
    if faults:
        return faults
    if outcome.status != 200:
        return [f"expected status 200, got {outcome.status}"]
    if len(outcome.answers) != case.num_answers:
        return [f"expected {case.num_answers} answers, got {len(outcome.answers)}"]
    return []


def _rest(question: Question, answer: Reply, parting: int) -> tuple[Question, Reply]:
    """What is left behind token ``parting``: a question whose prompt holds all up to it, and the end of the answer."""
    taken = parting + 1
    rest = Question((*question.prompt_ids, *answer.token_ids[:taken]), question.new_tokens - taken, question.stop)
    return rest, replace(answer, tokens=(answer.tokens or ())[taken:])
