"""A warm-up that meets every kernel before a server's first user does.

A kernel is compiled when it is first launched, and how a step is cut into launches depends on its number of tokens: on a GPU
the first prompts of every length would wait up to a minute. SGLang runs the warm-ups that ``--warmups`` names before it
listens; ours is ``dsv4``.
"""

import asyncio
import logging
import random
import time
from typing import Any

logger = logging.getLogger(__name__)

NAME = "dsv4"
_SHORTEST = 16
_TOGETHER = 8  # short prompts at once: a step of few tokens of several requests
_IDLE_S = 60.0


def ask_for(args: Any) -> None:
    """Add our warm-up to the ones that were asked for, unless the user wants none.

    Args:
        args (Any): parsed flags or a ServerArgs; ``warmups`` is set.
    """
    names = args.warmups.split(",") if args.warmups else []
    if not args.skip_server_warmup and NAME not in names:
        args.warmups = ",".join([*names, NAME])


def register() -> None:
    """Make SGLang know our warm-up."""
    from sglang.srt.entrypoints.warmup import warmup

    warmup(NAME)(warm_up)


def prompt_lengths(longest: int) -> list[int]:
    """Powers of two up to ``longest``, and ``longest``: between two of them launches are cut alike."""
    lengths = []
    length = _SHORTEST
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, max(1, longest)]


async def warm_up(disaggregation_mode: str, manager: Any) -> None:
    """Generate a few tokens after prompts of all lengths, alone and together, and forget them.

    Args:
        disaggregation_mode (str): SGLang's; with our cache always ``"null"``.
        manager (Any): SGLang's TokenizerManager.
    """
    del disaggregation_mode
    chunk = manager.server_args.chunked_prefill_size or -1
    room = manager.max_req_input_len // 2  # no more than half of a small pool
    lengths = prompt_lengths(min(chunk, room) if chunk > 0 else room)
    begin, rng = time.monotonic(), random.Random(0)
    logger.info(
        "sglang_dsv4: warming up with prompts of %s tokens (--skip-server-warmup leaves it out)", ", ".join(map(str, lengths))
    )
    for length in lengths:
        await _generate(manager, _random_ids(manager, rng, length))
    short = min(_SHORTEST // 3, lengths[-1])
    together = [_random_ids(manager, rng, short) for _ in range(_TOGETHER)]
    await asyncio.gather(*(_generate(manager, ids) for ids in together))
    flushed = await manager.flush_cache(timeout_s=_IDLE_S)
    if not flushed.success:
        logger.warning("sglang_dsv4: the warm-up's prompts stay in the prefix cache: %s", flushed.message)
    logger.info("sglang_dsv4: warm after %.1f s", time.monotonic() - begin)


def _random_ids(manager: Any, rng: random.Random, count: int) -> list[int]:
    vocab_size = manager.model_config.vocab_size
    return [rng.randrange(vocab_size) for _ in range(count)]


async def _generate(manager: Any, ids: list[int]) -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    sampling = {"max_new_tokens": 3, "temperature": 0.0, "ignore_eos": True}
    request = GenerateReqInput(input_ids=ids, sampling_params=sampling)
    async for _ in manager.generate_request(request, None):
        pass
