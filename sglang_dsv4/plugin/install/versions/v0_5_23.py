"""SGLang 0.5.23."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install import options
from sglang_dsv4.plugin.install.hooks import Hook
from sglang_dsv4.plugin.install.versions import probes
from sglang_dsv4.plugin.install.versions.interface import Refusal, SGLangVersion, ratio_tokens

logger = logging.getLogger(__name__)

_SRT = "sglang.srt"
_OPS = "sglang.kernels.ops"
_POOL = f"{_SRT}.mem_cache.deepseek_v4_memory_pool.DeepSeekV4TokenToKVPool"
_SIZES = f"{_SRT}.model_executor.pool_configurator.DSV4PoolConfigurator"
_SERVERS = "sglang.cli.serve_backends.ServeBackendRegistry"
_CONFIGURE = f"{_SRT}.mem_cache.kv_cache_configurator.KVCacheConfigurator.configure"

_TREE_CORES = f"{_SRT}.mem_cache.unified_cache.tree_core_registry"

# How SGLang's own pool would be laid out. Ours has one layout: that of DeepSeek-V4.
_LAYOUT = {
    "request_window": None,
    "needs_paged_swa_allocator": True,
    "swa_req_ring_size": None,
    "uniform_fp8": False,
    "_unified_kv": False,
    "kv_layout": "v4",
}


def _view(args: Any) -> Any:
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    return resolving_view(args) if isinstance(args, ServerArgs) else args


def _find_server(original: Callable[..., Any], registry: Any, request: Any) -> Any:
    """Keep ``sglang serve`` from its diffusion server, which would pass over our flags in silence."""
    return registry.get("llm") if options.is_asked_for(request.argv) else original(registry, request)


def _get_server(result: Any, registry: Any, name: str) -> None:
    """Refuse a server that was named, SGLang's or of another package."""
    if options.is_asked_for(sys.argv):
        options.check_server(name)


def _configure(original: Callable[..., Any], configurator: Any, **kwargs: Any) -> Any:
    """Pass SGLang's refusal of fp8 on a CPU: the dtype is that of its own rows, which are not allocated."""
    import torch

    if torch.device(configurator.device).type == "cpu":
        configurator.kv_cache_dtype = torch.bfloat16
    return original(configurator, **kwargs)


def _name_fall_back(result: str, name: str, params: Any) -> None:
    """SGLang goes on in Python where its Rust core cannot serve, and says so among its other lines at INFO."""
    from sglang.srt.mem_cache.unified_cache import tree_core_registry

    if name == "rust" and result != name:
        reason = tree_core_registry._rust_fallback_reason(params)
        logger.warning("sglang_dsv4: the prefix cache runs in Python, not in Rust, and is slower: %s", reason)


def _asked_window_tokens(args: Any) -> int | None:
    # With requests and chunks known, and no share asked for, SGLang sizes the pool by them.
    by_requests = not args._swa_full_tokens_ratio_explicitly_set and args.max_running_requests is not None
    if args.max_total_tokens is None or by_requests:
        return None
    return ratio_tokens(args.max_total_tokens, args.swa_full_tokens_ratio or 0.1, args.page_size or 256)


def _check_pool(pool: Any) -> None:
    for name, expected in _LAYOUT.items():
        found = getattr(pool, name)
        if getattr(found, "value", found) != expected:
            raise UnsupportedError(f"SGLang's pool: expected {name} {expected}, got {found}")


@functools.cache
def _begin_without_server() -> None:
    from sglang.srt.runtime_context import get_context

    get_context().override_server_args().install()


def _prefix_cache(tree: Any) -> str:
    return type(getattr(tree, "tree_core", tree)).__name__


V0_5_23 = SGLangVersion(
    number="0.5.23",
    answers={
        probes.SERVER_ARGS: False,
        probes.SERVE: True,
        probes.SMALL_POOL: True,
        probes.STATE_POOLS: True,
        probes.NORM_ROPE: True,
        probes.REPLAY: True,
    },
    resolve=f"{_SRT}.server_args.ServerArgs.resolve_once",
    is_resolved=lambda args: getattr(args, "_resolution_finished", False),
    view=_view,
    serve_hooks=(Hook(f"{_SERVERS}.auto_detect", _find_server, "AROUND"), Hook(f"{_SERVERS}.get", _get_server, "AFTER")),
    hooks=(
        Hook(_CONFIGURE, _configure, "AROUND", at_start=True),
        Hook(f"{_TREE_CORES}.resolve_tree_core_backend", _name_fall_back, "AFTER"),
    ),
    names={
        f"{_SRT}.arg_groups.overrides.resolving_view": "values that the server runs with",
        f"{_POOL}._make_compress_state_pool": "overridden: no native stream state is allocated",
        f"{_SIZES}._get_swa_tokens": "tokens of the sliding-window pool",
        f"{_TREE_CORES}.resolve_tree_core_backend": "whether the prefix cache runs in Rust",
        f"{_TREE_CORES}._rust_fallback_reason": "why it does not",
        _CONFIGURE: "passes the refusal of fp8 on a CPU",
    },
    ops={
        "q_norm_rope": (f"{_OPS}.attention.dsv4.norm_rope.fused_q_norm_rope", f"{_SRT}.models.deepseek_v4.fused_q_norm_rope"),
        "rope_inplace": (
            f"{_OPS}.attention.dsv4.norm_rope.fused_rope_inplace",
            f"{_SRT}.models.deepseek_v4.fused_rope_inplace",
        ),
        "silu_and_mul_clamp": (
            f"{_OPS}.activation.silu_and_mul_clamp.silu_and_mul_clamp",
            f"{_SRT}.models.deepseek_v2.silu_and_mul_clamp",
        ),
        "rope_wrapper": (
            f"{_SRT}.layers.rotary_embedding.factory.get_rope_wrapper",
            f"{_SRT}.models.deepseek_v4.get_rope_wrapper",
        ),
        "mhc_combine": (f"{_OPS}.layernorm.mhc.mhc_combine",),
    },
    refusals=(
        Refusal("--enable-kv-cache-sharding", "one process holds all rows of a request"),
        Refusal("--enable-unified-cache-external-linker", "boundary state is not copied to another store yet"),
        Refusal("--enable-encoder-swa-bounded-replay", "window rows are stored in pages, and not computed again"),
        Refusal("--enable-decoder-swa-bounded-replay", "window rows are stored in pages, and not computed again"),
        Refusal("--enable-mixed-chunk", "no step that mixes prompts and decodes was seen with this version yet"),
        Refusal("--enable-pd-role-switch", "every server prefills and decodes"),
        Refusal("--enable-nvidia-megakernel", "it replaces the layers that call the cache"),
        Refusal("--enable-amd-monokernel", "it replaces the layers that call the cache"),
        Refusal("--enable-layernorm-sp", "the cache needs a request's tokens in one process"),
        Refusal("--startup-weight-load-mode", "graphs would be captured before the weights are final", ("serial",)),
        Refusal("--dsv4-attn-backend", "attention is chosen by --dsv4-attention", ("auto", "flashmla")),
        Refusal("--dsv4-prefill-backend", "attention is chosen by --dsv4-attention", ("auto", "flashmla_sparse")),
    ),
    window_tokens=lambda sizes, tokens, page_size: sizes._get_swa_tokens(tokens, page_size),
    window_share=lambda sizes: 0.0 if sizes.swa_cap_tokens is not None else sizes.swa_ratio,
    asked_window_tokens=_asked_window_tokens,
    window_advice="raise --max-total-tokens or --swa-full-tokens-ratio (their product decides; SGLang takes 0.1 where the ratio "
    "is unset; with --max-running-requests and no ratio the requests and --swa-prefix-tails decide)",
    check_pool=_check_pool,
    begin_without_server=_begin_without_server,
    prefix_cache=_prefix_cache,
)
