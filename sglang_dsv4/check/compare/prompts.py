"""Prompts of random bytes."""

import random

from sglang_dsv4.tiny.tokenizer import FIRST_BYTE_ID, VOCAB_SIZE

Ids = tuple[int, ...]


def random_ids(rng: random.Random, count: int) -> Ids:
    """Token ids of ordinary bytes."""
    return tuple(rng.choices(range(FIRST_BYTE_ID, VOCAB_SIZE), k=count))
