"""Whether a prefix hit leaves the same bytes as a cold run, in a server's own pools."""

import random
from typing import Any

from sglang_dsv4.check.client import Client
from sglang_dsv4.check.compare.questions import random_ids
from sglang_dsv4.check.reply import Ids

# With chunks of one page a cold run's last chunk and a hit's only one are the same matrix products, so that the model hands
# the same bytes to both; and without graphs every step can be looked at.
OPTIONS = ("--dsv4-check", "step", "--chunked-prefill-size", "256", "--disable-cuda-graph")
LENGTHS = {"cuda": (257, 259, 300, 384, 511, 513, 700, 1023, 1030), "cpu": (259, 513, 700)}
NEW_TOKENS = 6


async def check_bytes(client: Client, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Ask cold, at a hit, cold again and at a hit of another request's prefix, and compare digests of all rows.

    Args:
        client (Client): of a server with `OPTIONS`.
        lengths (tuple[int, ...]): of the prompts, more than a page each.

    Returns:
        dict[str, Any]: ``compared`` and ``faults``. The twin, a prompt with one other token, is in it: it must have another
            digest.
    """
    faults: list[str] = []
    compared = 0
    for length in lengths:
        rng = random.Random(length)
        prompt = random_ids(rng, length)
        other = (prompt[0] ^ 1, *prompt[1:])
        cousin = (*prompt[:256], *random_ids(rng, 40))
        plan = (
            ("cold", prompt, True),
            ("hit", prompt, False),
            ("cousin", cousin, True),
            ("cousin's", prompt, False),
            ("cold again", prompt, True),
            ("twin", other, True),
        )
        found: dict[str, tuple[list[Any], int, Ids]] = {}
        for name, ids, is_cold in plan:
            if is_cold:
                await client.flush()
            rid = f"{name} {length}"
            reply = await client.generate(ids, NEW_TOKENS, rid=rid)
            digests = (await client.plugin_facts())["digests"]
            found[name] = (digests[rid], reply.cached_tokens, reply.token_ids)
        for name in ("hit", "cousin's"):
            if found[name][1] < 256:
                faults.append(f"{name} {length}: expected a prefix hit, got {found[name][1]} cached tokens")
        for name in ("hit", "cousin's", "cold again"):
            compared += 1
            if found[name][::2] != found["cold"][::2]:
                faults.append(f"{name} {length}: expected {found['cold'][0]}, got {found[name][0]}")
        if found["twin"][0] == found["cold"][0]:
            faults.append(f"twin {length}: expected another digest, got the same")
    return {"compared": compared, "lengths": list(lengths), "faults": faults}
