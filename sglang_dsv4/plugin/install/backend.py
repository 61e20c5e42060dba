"""Our backend in the place of SGLang's, when the model is loaded and the pool built."""

import logging
from pathlib import Path
from typing import Any

from sglang_dsv4.plugin.install import arguments, checkpoint, machine, model_fixes, options, refusals, versions
from sglang_dsv4.plugin.install.portable.install import check_all_installed
from sglang_dsv4.plugin.observe.proof import active_line, describe

logger = logging.getLogger(__name__)


def create_backend(runner: Any) -> Any:
    """What SGLang's registry of attention calls: our backend over our pool, and a line that says so.

    Args:
        runner (Any): SGLang's ModelRunner, with the model loaded and the pool built.

    Raises:
        SystemExit: the pool is not ours.
        UnsupportedError: the arguments, the model or a portable op is not as expected.
    """
    from sglang.srt.runtime_context import get_parallel

    from sglang_dsv4.attention import Attention, FixedShape, make_attention
    from sglang_dsv4.plugin.install.portable.model_ops import widen_bf16_parameters
    from sglang_dsv4.plugin.observe.checks import ServingChecks
    from sglang_dsv4.plugin.serve.backend import CompressedKVBackend
    from sglang_dsv4.plugin.serve.pool import CompressedTokenToKVPool

    pool = runner.token_to_kv_pool
    if not isinstance(pool, CompressedTokenToKVPool):
        raise SystemExit(f"sglang_dsv4: not active, the KV pool is {type(pool).__module__}.{type(pool).__name__}")
    # Again, because an Engine may be given arguments that were made before the plug-in was loaded.
    refusals.check_arguments(versions.installed().view(runner.server_args))
    arguments.check_device(str(runner.device))
    ops = check_all_installed()
    unscaled = model_fixes.unscale_window_rope(runner.model, pool.cache)
    model_fixes.check_rope(runner.model, pool.cache)
    heads = checkpoint.handed_heads(runner.model_config.num_attention_heads, get_parallel().tp_size)
    name = options.read().attention
    attention, reason = make_attention(name, pool.cache, heads)
    machine.check_dtype(str(runner.dtype).removeprefix("torch."), attention.name)
    widened = widen_bf16_parameters(runner.model, runner.dtype)
    if widened:
        ops.append(f"{len(widened)} bf16 parameters widened to {runner.dtype}")
    if unscaled:
        ops.append(f"unscaled RoPE of window-only layers {unscaled}")

    def of_shape(fixed: FixedShape, like: Attention | None) -> Attention:
        return make_attention(name, pool.cache, heads, fixed=fixed, like=like)[0]

    facts = describe(pool.cache, attention.name, reason, ops)
    pool.facts = facts
    logger.info(active_line(facts))
    chosen = options.read()
    checks = None
    if chosen.check != "off":
        checks = ServingChecks(pool.cache, chosen.check, Path(chosen.dumps))
        logger.info("sglang_dsv4: integrity checks: %s", chosen.check)
    return CompressedKVBackend(
        pool, runner.req_to_token_pool.req_to_token, attention, checks, of_shape if pool.cache.device.type == "cuda" else None
    )
