"""What a comparison asks, and the faults that it plants."""

import random

from sglang_dsv4.check.reply import Ids, Question
from sglang_dsv4.tiny.tokenizer import FIRST_BYTE_ID, VOCAB_SIZE

NEW_TOKENS = (4, 12, 24)
# Around blocks of 4 and 128, the window and a page of 256, and some lengths in between.
EDGES = (1, 3, 4, 5, 127, 128, 129, 131, 132, 255, 256, 257, 260, 384, 511, 512, 513, 640, 769)
# Faults that are planted, and what share of them must be noticed.
PLANTED = {"the first page": 1.0, "most of the window": 1.0, "a token of the window": 0.5}
# One token moves an answer by about 1, as bf16 and fp8 rows may; it is planted only where rounding is much less.
SHARP_BOUND = 0.1


def random_ids(rng: random.Random, count: int) -> Ids:
    """Token ids of ordinary bytes."""
    return tuple(rng.choices(range(FIRST_BYTE_ID, VOCAB_SIZE), k=count))


def make_questions(count: int, longest: int, seed: int) -> list[Question]:
    """Mixed lengths; every fourth prompt begins with one or two pages of another prompt."""
    rng = random.Random(seed)
    edges = [length for length in EDGES if length <= longest]
    found: list[Question] = []
    for number in range(count):
        length = rng.choice(edges) if number % 2 else rng.randint(1, longest)
        prompt = random_ids(rng, length)
        shared = 256 * rng.randint(1, 2)
        if number % 4 == 3 and length > shared:
            givers = [other for other in found if len(other.prompt_ids) > shared]
            if givers:
                prompt = rng.choice(givers).prompt_ids[:shared] + prompt[shared:]
        found.append(Question(prompt, rng.choice(NEW_TOKENS)))
    return found


def wrong_question(question: Question, kind: str, rng: random.Random) -> Question:
    """The question with one of `PLANTED` in its prompt."""
    prompt = question.prompt_ids
    if kind == "the first page":
        size = min(256, len(prompt) // 2)
        return Question((*random_ids(rng, size), *prompt[size:]), question.new_tokens)
    end = max(1, len(prompt) - 4)
    begin = max(0, end - (96 if kind == "most of the window" else 1))
    wrong = (token_id ^ 1 for token_id in prompt[begin:end])
    return Question((*prompt[:begin], *wrong, *prompt[end:]), question.new_tokens)
