"""The control of a stress test: answers to wrong prompts, which must be noticed."""

from collections.abc import Iterator, Sequence

from sglang_dsv4.check.demo.workload import PAGE_TOKENS
from sglang_dsv4.check.reply import Ids, Reply
from sglang_dsv4.check.stress.replies import Outcome

CONTROL_WIDTHS = (4, 32, PAGE_TOKENS)


def is_served(outcome: Outcome) -> bool:
    """Whether a whole answer was asked for: the latency of a client that left says nothing."""
    return outcome.case.invalid is None and outcome.case.leave_after is None


def has_logprobs(reply: Reply) -> bool:
    """Whether log-probabilities came with the tokens; some may have been lost."""
    return any(token.logprob is not None for token in reply.tokens or ())


def control_answer(outcomes: Sequence[Outcome]) -> tuple[Outcome, int] | None:
    """The answer that a wrong prompt must change: of the longest prompt that came with tokens, log-probabilities first."""
    found = [
        (outcome, index)
        for outcome in outcomes
        for index, answer in enumerate(outcome.answers)
        if is_served(outcome) and answer.tokens and not outcome.case.stop
    ]

    def rank(pair: tuple[Outcome, int]) -> tuple[bool, int]:
        answer = pair[0].answers[pair[1]]
        return has_logprobs(answer), answer.prompt_tokens

    return max(found, key=rank, default=None)


def wrong_prompts(prompt_ids: Ids, *, has_logprobs: bool) -> Iterator[tuple[Ids, str]]:
    """Prompts with more and more tokens replaced, each with a description: one token, an entry's, a page's, all.

    The first one that is noticed says how fine the comparison is. With log-probabilities the replaced tokens start in the first
    quarter: a long prompt knows them through compressed entries only. Without, they are the last ones, since tokens may stay the
    same.
    """
    length = len(prompt_ids)
    for width in sorted({1, length, *(width for width in CONTROL_WIDTHS if width < length)}):
        last = length - width
        begin = min(length // 4, last) if has_logprobs else last
        replaced = (token_id ^ 1 for token_id in prompt_ids[begin : begin + width])
        where = f"with {width} of {length} tokens replaced, starting at {begin}"
        yield (*prompt_ids[:begin], *replaced, *prompt_ids[begin + width :]), where
