"""Put our pool, backend and portable ops in their places."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4_kernels import memory
from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin import contract, launch, options, refusals
from sglang_dsv4.plugin.startup import active_line, describe
from sglang_dsv4.plugin.usage import pool_usage, process_bytes
from sglang_dsv4.spec import CacheSpec

logger = logging.getLogger(__name__)

_installed_ops: list[Any] = []


def prepare(args: Any) -> None:
    """Check what a user asked for, before SGLang resolves it, and fill in the device where none was named.

    Args:
        args (Any): parsed flags or a ServerArgs; ``device`` is set where it is None, since SGLang looks for accelerators only.

    Raises:
        UnsupportedError: an argument, the device or the checkpoint is not supported.
    """
    refusals.check_arguments(args)
    refusals.check_device(args.device, has_cuda=torch.cuda.is_available())
    spec = refusals.check_checkpoint(args.model_path, options.read().formats())
    refusals.check_attention(options.read().attention, spec)
    if args.device is None:
        args.device = "cpu"


def check_resolved(server_args: Any) -> None:
    """Check what SGLang made of the arguments.

    Args:
        server_args (Any): a resolved ServerArgs.

    Raises:
        UnsupportedError: as in `prepare`, or the pool of window pages is too small.
    """
    refusals.check_arguments(server_args)
    if server_args.max_total_tokens is not None:
        ratio = server_args.swa_full_tokens_ratio
        refusals.check_window_pool(refusals.window_tokens(server_args.max_total_tokens, ratio))


def activate() -> None:
    """Register every hook; needs the flag or variable to be set.

    Raises:
        UnsupportedError: SGLang lacks a name that we touch, or did not apply a hook.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_dsv4.plugin.portable.capabilities import Capabilities
    from sglang_dsv4.plugin.portable.environment import apply_environment
    from sglang_dsv4.plugin.portable.install import install

    capabilities = Capabilities.detect("cpu")  # the only device that is not refused
    apply_environment(capabilities)
    contract.check_names()
    _installed_ops[:] = install(capabilities)
    hooks = (
        (contract.CHECK_ARGS, _check_server_args, HookType.BEFORE),
        (contract.BUILD_POOL, _build_pool, HookType.AROUND),
        (contract.POOL_SIZES, _size_pools, HookType.AFTER),
        (contract.STATE_BYTES, _state_bytes, HookType.AROUND),
        (contract.INTERNAL_STATE, _internal_state, HookType.AFTER),
        (contract.INIT_INFO, _check_serving, HookType.AFTER),
        (contract.VALIDATE, _validate_input_ids, HookType.AFTER),
    )
    for hook in hooks:
        HookRegistry.register(*hook)
    HookRegistry.apply_hooks()
    launch.check_hooks(hooks)
    register_attention_backend("dsv4")(_create_backend)


def _check_server_args(server_args: Any) -> None:
    """Check arguments that may have been made before the plug-in was loaded."""
    refusals.check_device(server_args.device, has_cuda=torch.cuda.is_available())
    spec = refusals.check_checkpoint(server_args.model_path, options.read().formats())
    refusals.check_attention(options.read().attention, spec)
    check_resolved(server_args)


def _spec_of(model_config: Any) -> CacheSpec:
    return CacheSpec.from_hf(
        model_config.hf_config, page_tokens=refusals.PAGE_TOKENS, **options.read().formats()
    )


def _build_pool(original: Callable[..., Any], configurator: Any, **kwargs: Any) -> Any:
    from sglang.srt.mem_cache import kv_cache_configurator

    from sglang_dsv4.plugin.pool import pool_factory

    if configurator.is_draft_worker:
        raise UnsupportedError(
            "speculative decoding: not supported with --enable-dsv4-compressed-kv"
        )
    # For debugging: whatever was not written is NaN, so that a server that answers right has read nothing unwritten.
    memory.set_poison(env.is_enabled(env.POISON))
    max_seq_len = configurator.model_config.context_len
    native = kv_cache_configurator.DeepSeekV4TokenToKVPool
    kv_cache_configurator.DeepSeekV4TokenToKVPool = pool_factory(
        _spec_of(configurator.model_config), max_seq_len
    )
    try:
        return original(configurator, **kwargs)
    finally:
        kv_cache_configurator.DeepSeekV4TokenToKVPool = native


def _size_pools(result: None, sizes: Any, configurator: Any) -> None:
    from sglang_dsv4.cache.report import window_page_bytes

    spec = _spec_of(configurator.model_config)
    sizes.sglang_dsv4_spec = spec
    window = sizes.swa_ratio * window_page_bytes(spec) / spec.page_tokens
    sizes.bytes_per_full_token = spec.history_bytes_per_token() + window


def _state_bytes(original: Callable[..., Any], sizes: Any, max_running_requests: int) -> int:
    from sglang_dsv4.cache.report import stream_bytes_per_request

    del original
    return sizes._get_num_req_slots(max_running_requests) * stream_bytes_per_request(
        sizes.sglang_dsv4_spec
    )


def _create_backend(runner: Any) -> Any:
    from sglang_dsv4.attention import make_attention
    from sglang_dsv4.plugin import model_fixes
    from sglang_dsv4.plugin.backend import CompressedKVBackend
    from sglang_dsv4.plugin.checks import ServingChecks
    from sglang_dsv4.plugin.pool import CompressedTokenToKVPool
    from sglang_dsv4.plugin.portable.install import check_installed
    from sglang_dsv4.plugin.portable.model_ops import widen_bf16_parameters

    pool = runner.token_to_kv_pool
    if not isinstance(pool, CompressedTokenToKVPool):
        raise SystemExit(
            f"sglang_dsv4: not active, the KV pool is {type(pool).__module__}.{type(pool).__name__}"
        )
    # Again, because an Engine may be given arguments that were made before the plug-in was loaded.
    refusals.check_arguments(runner.server_args)
    refusals.check_device(str(runner.device), has_cuda=torch.cuda.is_available())
    check_installed(_installed_ops)
    unscaled = model_fixes.unscale_window_rope(runner.model, pool.cache)
    model_fixes.check_rope(runner.model, pool.cache)
    widened = widen_bf16_parameters(runner.model, runner.dtype)
    ops = [op.name for op in _installed_ops]
    if widened:
        ops.append(f"{len(widened)} bf16 parameters widened to {runner.dtype}")
    if unscaled:
        ops.append(f"unscaled RoPE of window-only layers {unscaled}")
    heads = runner.model_config.num_attention_heads // runner.ps.tp_size
    attention, reason = make_attention(options.read().attention, pool.cache, heads)
    facts = describe(pool.cache, attention.name, reason, ops)
    pool.facts = facts
    logger.info(active_line(facts))
    chosen = options.read()
    checks = None
    if chosen.check != "off":
        checks = ServingChecks(pool.cache, chosen.check, Path(chosen.dumps))
        logger.info("sglang_dsv4: integrity checks: %s", chosen.check)
    return CompressedKVBackend(pool, runner.req_to_token_pool.req_to_token, attention, checks)


def _check_serving(result: Any, scheduler: Any) -> None:
    """End a scheduler that is about to say that it is ready, and would serve with another cache than ours.

    The checks of the arguments know a checkpoint by its configuration; what SGLang made of it is known only here.
    """
    from sglang_dsv4.plugin.backend import CompressedKVBackend
    from sglang_dsv4.plugin.pool import CompressedTokenToKVPool

    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    backend = scheduler.tp_worker.model_runner.attn_backend
    for what, found, expected in (
        ("KV pool", pool, CompressedTokenToKVPool),
        ("attention backend", backend, CompressedKVBackend),
    ):
        if not isinstance(found, expected):
            kind = type(found)
            raise SystemExit(
                f"sglang_dsv4: not active, the {what} is {kind.__module__}.{kind.__qualname__}"
            )


def _validate_input_ids(
    result: None, manager: Any, obj: Any, input_ids: list[int] | None, *_: Any
) -> None:
    """Refuse a request whose token ids are not in the vocabulary; in the scheduler they would end the server."""
    vocab_size = manager.model_config.vocab_size
    for token_id in input_ids or ():
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"input_ids: expected ids of 0 .. {vocab_size - 1}, got {token_id}")


def _internal_state(result: Any, scheduler: Any, *_: Any, **__: Any) -> Any:
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    backend = scheduler.tp_worker.model_runner.attn_backend
    usage = pool_usage(scheduler, pool.cache.spec.page_tokens)
    checks = {"level": "off"} if backend.checks is None else backend.checks.facts()
    result.internal_state["sglang_dsv4"] = {
        **pool.facts,
        "steps": dict(backend.steps),
        "usage": usage,
        "checks": checks,
        "memory": process_bytes(pool.cache.device),
    }
    return result
