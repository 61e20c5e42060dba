"""Put our pool, backend and portable ops in their places."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4_kernels import memory
from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install import contract, launch, options, refusals, warm_up
from sglang_dsv4.plugin.observe import metrics
from sglang_dsv4.plugin.observe.occupancy import pool_usage, process_bytes
from sglang_dsv4.plugin.observe.proof import active_line, describe
from sglang_dsv4.spec import CacheSpec

logger = logging.getLogger(__name__)

_installed_ops: list[Any] = []
_MOST_REQUESTS = 4096  # where nobody named a number, SGLang takes no more


def prepare(args: Any) -> None:
    """Check what a user asked for, before SGLang resolves it; fill in the device where none was named, and our warm-up.

    Args:
        args (Any): parsed flags or a ServerArgs; ``device`` is set where it is None, since SGLang looks for accelerators only,
            and on a GPU ``warmups``.

    Raises:
        UnsupportedError: an argument, the device or the checkpoint is not supported.
    """
    device = found_device(args.device)
    refusals.check_arguments(args)
    check_device(device)
    _check_attention(args, device)
    if args.device is None:
        args.device = device
    if torch.device(device).type == "cuda":
        warm_up.ask_for(args)
    if refusals.is_unquantised(args.model_path):
        # SGLang's output projection takes FP8 weights unless told otherwise, whatever the checkpoint has.
        env.set_default("SGLANG_OPT_FP8_WO_A_GEMM", "0")


def found_device(named: str | None) -> str:
    """The device that is meant: the one that was named, else a GPU where there is one."""
    return named or ("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: str) -> None:
    """Refuse a device that is not served, or for which this process has not been prepared.

    Raises:
        UnsupportedError: says which.
    """
    refusals.check_device(device, refusals.compute_capability(device))
    prepared = env.get(env.DEVICE)
    kind = torch.device(device).type
    if prepared is not None and prepared != kind:
        raise UnsupportedError(
            f"--device {device}: expected {prepared}, for which the plug-in was loaded; set {env.DEVICE}={kind}"
        )


def _check_attention(args: Any, device: str) -> None:
    """Refuse an attention, or a dtype with it, that is not possible, before the model is loaded."""
    spec = refusals.check_checkpoint(args.model_path, options.read().formats())
    heads = refusals.query_heads(args.model_path, getattr(args, "tp_size", None) or 1)
    attention = refusals.check_attention(options.read().attention, spec, device, heads)
    refusals.check_dtype(getattr(args, "dtype", None) or "auto", attention)


def check_resolved(server_args: Any) -> None:
    """Check what SGLang made of the arguments.

    Args:
        server_args (Any): a resolved ServerArgs.

    Raises:
        UnsupportedError: as in `prepare`, or the pool of window pages is too small.
    """
    refusals.check_arguments(server_args)
    if torch.device(server_args.device).type == "cuda":
        refusals.check_graphs(server_args.cuda_graph_config)
    if server_args.max_total_tokens is not None:
        ratio = server_args.swa_full_tokens_ratio
        refusals.check_window_pool(refusals.window_tokens(server_args.max_total_tokens, ratio))


def activate(device: str | None) -> None:
    """Register every hook; needs the flag or variable to be set.

    Args:
        device (str | None): what the server will run on; None takes what `found_device` takes, or what a parent process took.

    Raises:
        UnsupportedError: SGLang lacks a name that we touch, or did not apply a hook.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_dsv4.plugin.install.portable.capabilities import Capabilities
    from sglang_dsv4.plugin.install.portable.environment import apply_environment
    from sglang_dsv4.plugin.install.portable.install import install

    chosen = found_device(device or env.get(env.DEVICE))
    refusals.check_device(chosen, refusals.compute_capability(chosen))
    env.set_value(env.DEVICE, torch.device(chosen).type)
    capabilities = Capabilities.detect(chosen)
    apply_environment(capabilities)
    contract.check_names()
    _installed_ops[:] = install(capabilities)
    hooks = (
        (contract.CHECK_ARGS, _check_server_args, HookType.BEFORE),
        (contract.BUILD_POOL, _build_pool, HookType.AROUND),
        (contract.POOL_SIZES, _size_pools, HookType.AFTER),
        (contract.FIT_POOLS, _fit_pools, HookType.AROUND),
        (contract.INTERNAL_STATE, _internal_state, HookType.AFTER),
        (contract.INIT_INFO, _check_serving, HookType.AFTER),
        (contract.VALIDATE, _validate_input_ids, HookType.AFTER),
        (contract.INIT_INFO, metrics.begin, HookType.AFTER),
        (contract.RUN_BATCH, metrics.around_step, HookType.AROUND),
        (contract.ON_IDLE, metrics.before_idle, HookType.BEFORE),
    )
    for hook in hooks:
        HookRegistry.register(*hook)
    HookRegistry.apply_hooks()
    launch.check_hooks(hooks)
    register_attention_backend("dsv4")(_create_backend)
    warm_up.register()


def _check_server_args(server_args: Any) -> None:
    """Check arguments that may have been made before the plug-in was loaded."""
    device = found_device(server_args.device)
    check_device(device)
    _check_attention(server_args, device)
    check_resolved(server_args)


def _spec_of(model_config: Any) -> CacheSpec:
    return CacheSpec.from_hf(model_config.hf_config, page_tokens=refusals.PAGE_TOKENS, **options.read().formats())


def _build_pool(original: Callable[..., Any], configurator: Any, **kwargs: Any) -> Any:
    from sglang.srt.mem_cache import kv_cache_configurator

    from sglang_dsv4.plugin.serve.pool import pool_factory

    if configurator.is_draft_worker:
        raise UnsupportedError("speculative decoding: not supported with --enable-dsv4-compressed-kv")
    # For debugging: whatever was not written is NaN, so that a server that answers right has read nothing unwritten.
    memory.set_poison(env.is_enabled(env.POISON))
    native = kv_cache_configurator.DeepSeekV4TokenToKVPool
    kv_cache_configurator.DeepSeekV4TokenToKVPool = pool_factory(_spec_of(configurator.model_config), configurator.model_config)
    try:
        return original(configurator, **kwargs)
    finally:
        kv_cache_configurator.DeepSeekV4TokenToKVPool = native


def _size_pools(result: None, sizes: Any, configurator: Any) -> None:
    from sglang_dsv4.plugin.serve.budget import bytes_per_token

    spec = _spec_of(configurator.model_config)
    sizes.sglang_dsv4 = (spec, configurator.model_config, configurator.device)
    sizes.bytes_per_full_token = bytes_per_token(spec, sizes.swa_ratio)


def _fit_pools(original: Callable[..., Any], sizes: Any, available_bytes: int, page_size: int) -> Any:
    """Sizes of SGLang's pools, so that our cache takes what it was given."""
    from sglang_dsv4.plugin.serve.budget import shape_of

    del original
    spec, model_config, device = sizes.sglang_dsv4
    requests = sizes.requested_max_running_requests_per_worker or _MOST_REQUESTS
    shape = shape_of(spec, model_config, sizes._get_num_req_slots(requests), device)

    def window_tokens(tokens: int) -> int:
        return sizes._compute_dsv4_sizes(tokens, page_size).swa_max_total_num_tokens

    tokens = shape.most_tokens(available_bytes, window_tokens)
    logger.info(
        "sglang_dsv4: %d tokens fit into %.2f GiB (%.1f bytes a token, %d requests)",
        tokens,
        available_bytes / (1 << 30),
        sizes.bytes_per_full_token,
        requests,
    )
    return sizes._to_config(sizes._compute_dsv4_sizes(tokens, page_size))


def _create_backend(runner: Any) -> Any:
    from sglang_dsv4.attention import Attention, FixedShape, make_attention
    from sglang_dsv4.plugin.install import model_fixes
    from sglang_dsv4.plugin.install.portable.install import check_installed
    from sglang_dsv4.plugin.install.portable.model_ops import widen_bf16_parameters
    from sglang_dsv4.plugin.observe.checks import ServingChecks
    from sglang_dsv4.plugin.serve.backend import CompressedKVBackend
    from sglang_dsv4.plugin.serve.pool import CompressedTokenToKVPool

    pool = runner.token_to_kv_pool
    if not isinstance(pool, CompressedTokenToKVPool):
        raise SystemExit(f"sglang_dsv4: not active, the KV pool is {type(pool).__module__}.{type(pool).__name__}")
    # Again, because an Engine may be given arguments that were made before the plug-in was loaded.
    refusals.check_arguments(runner.server_args)
    check_device(str(runner.device))
    check_installed(_installed_ops)
    unscaled = model_fixes.unscale_window_rope(runner.model, pool.cache)
    model_fixes.check_rope(runner.model, pool.cache)
    heads = refusals.handed_heads(runner.model_config.num_attention_heads, runner.ps.tp_size)
    name = options.read().attention
    attention, reason = make_attention(name, pool.cache, heads)
    refusals.check_dtype(str(runner.dtype).removeprefix("torch."), attention.name)
    widened = widen_bf16_parameters(runner.model, runner.dtype)
    ops = [op.name for op in _installed_ops]
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


def _check_serving(result: Any, scheduler: Any) -> None:
    """End a scheduler that is about to say that it is ready, and would serve with another cache than ours.

    The checks of the arguments know a checkpoint by its configuration; what SGLang made of it is known only here.
    """
    from sglang_dsv4.plugin.serve.backend import CompressedKVBackend
    from sglang_dsv4.plugin.serve.pool import CompressedTokenToKVPool

    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    backend = scheduler.tp_worker.model_runner.attn_backend
    for what, found, expected in (
        ("KV pool", pool, CompressedTokenToKVPool),
        ("attention backend", backend, CompressedKVBackend),
    ):
        if not isinstance(found, expected):
            kind = type(found)
            raise SystemExit(f"sglang_dsv4: not active, the {what} is {kind.__module__}.{kind.__qualname__}")


def _validate_input_ids(result: None, manager: Any, obj: Any, input_ids: list[int] | None, *_: Any) -> None:
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
        "attention_bytes": backend.attention_bytes(),
        "checks": checks,
        "digests": {} if backend.checks is None else dict(backend.checks.digests),
        "memory": process_bytes(pool.cache.device),
    }
    return result
