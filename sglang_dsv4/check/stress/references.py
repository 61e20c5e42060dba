"""Asks for every distinct request once more, alone and on a cold cache, and judges all its answers."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from sglang_dsv4.check.stress.answers import Answer, Outcome
from sglang_dsv4.check.stress.cases import CHAT
from sglang_dsv4.check.stress.check import Reference, Verdict, judge, judge_outcome

# Prompt, tokens asked for, stop strings.
Question = tuple[tuple[int, ...], int, tuple[str, ...]]
Ask = Callable[[Question], Awaitable[Reference]]
Tokenize = Callable[[str], Awaitable[tuple[int, ...]]]


@dataclass
class Findings:
    """What the comparison found.

    Attributes:
        mismatches (list[tuple[Outcome, str]]): everything wrong, with whose it is.
        num_answers (int): answers that were compared.
        num_tokens (int): tokens that were compared.
        num_doubts (int): answers that went another way where the two best tokens were too close to tell, and were
            compared anew from there.
        num_uncompared (int): answers whose text differs behind such a place, and that come without token ids.
        largest (float): largest difference of a log-probability that was allowed.
    """

    mismatches: list[tuple[Outcome, str]] = field(default_factory=list)
    num_answers: int = 0
    num_tokens: int = 0
    num_doubts: int = 0
    num_uncompared: int = 0
    largest: float = 0.0


class Judge:
    """Compares outcomes with references, and keeps these.

    Args:
        ask (Ask): answers a question alone on a cold cache.
        tokenize (Tokenize): the tokens of a chat.
        bound (float): largest difference of a log-probability between two runs that are both right; it may be set until
            the first answer is judged.
    """

    def __init__(self, ask: Ask, tokenize: Tokenize, bound: float = 0.0) -> None:
        self.bound = bound
        self.findings = Findings()
        self._ask = ask
        self._tokenize = tokenize
        self._references: dict[Question, Reference] = {}
        self._chats: dict[str, tuple[int, ...]] = {}

    @property
    def num_references(self) -> int:
        """Requests asked for alone so far."""
        return len(self._references)

    async def add(self, outcome: Outcome) -> list[str]:
        """Judge one outcome; what is wrong with it, which `findings` has too."""
        faults = judge_outcome(outcome)
        if not faults and outcome.case.invalid is None:
            for answer in outcome.answers:
                self.findings.num_answers += 1
                faults += await self._judge_answer(outcome, answer)
        self.findings.mismatches += [(outcome, fault) for fault in faults]
        return faults

    async def reference(self, question: Question) -> Reference:
        """The answer to a question alone; asked for once."""
        if question not in self._references:
            self._references[question] = await self._ask(question)
        return self._references[question]

    async def question(self, outcome: Outcome, answer: Answer) -> Question:
        """What an answer answers."""
        case = outcome.case
        if case.endpoint != CHAT:
            return case.prompts[answer.prompt], case.new_tokens, case.stop
        if case.message not in self._chats:
            self._chats[case.message] = await self._tokenize(case.message)
        return self._chats[case.message], case.new_tokens, case.stop

    async def _judge_answer(self, outcome: Outcome, answer: Answer) -> list[str]:
        question = await self.question(outcome, answer)
        is_whole = outcome.case.leave_after is None
        reference = await self.reference(question)
        verdict = self._note(judge(answer, reference, self.bound, is_whole=is_whole))
        faults = list(verdict.faults)
        while not faults and verdict.doubt is not None:
            if answer.token_ids is None:
                self.findings.num_uncompared += 1
                break
            self.findings.num_doubts += 1
            question, answer = _rest(question, answer, verdict.doubt)
            if question[1] == 0 or not answer.token_ids:
                break
            reference = await self.reference(question)
            # Where it went on is another text; the tokens say all.
            answer = replace(answer, text=reference.text)
            verdict = self._note(judge(answer, reference, self.bound, is_whole=is_whole))
            faults += verdict.faults
        return faults

    def _note(self, verdict: Verdict) -> Verdict:
        self.findings.num_tokens += verdict.compared
        self.findings.largest = max(self.findings.largest, verdict.largest)
        return verdict


def _rest(question: Question, answer: Answer, doubt: int) -> tuple[Question, Answer]:
    """What is left behind token ``doubt``: the question whose prompt holds all up to it, and the end of the answer."""
    prompt_ids, new_tokens, stop = question
    assert answer.token_ids is not None, "only tokens can be in doubt one by one"
    taken = doubt + 1
    logprobs = None if answer.logprobs is None else answer.logprobs[taken:]
    rest = (*prompt_ids, *answer.token_ids[:taken]), new_tokens - taken, stop
    return rest, replace(answer, token_ids=answer.token_ids[taken:], logprobs=logprobs)
