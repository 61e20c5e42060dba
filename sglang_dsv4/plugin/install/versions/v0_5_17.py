"""SGLang 0.5.17."""

from typing import Any

from sglang_dsv4.plugin.install import options
from sglang_dsv4.plugin.install.hooks import Hook
from sglang_dsv4.plugin.install.versions import probes
from sglang_dsv4.plugin.install.versions.interface import SGLangVersion, ratio_tokens

_SRT = "sglang.srt"
_OPS = "sglang.kernels.ops"
_POOL = f"{_SRT}.mem_cache.deepseek_v4_memory_pool.DeepSeekV4TokenToKVPool"


def _serve_kind(result: tuple[str, list[str]], argv: list[str]) -> tuple[str, list[str]]:
    """Keep ``sglang serve`` from its diffusion server, which would pass over our flags in silence."""
    kind, rest = result
    if not options.is_asked_for(argv):
        return result
    options.check_server(kind)
    return "llm", rest


def _window_tokens(sizes: Any, tokens: int, page_size: int) -> int:
    return sizes._compute_dsv4_sizes(tokens, page_size).swa_max_total_num_tokens


def _asked_window_tokens(args: Any) -> int | None:
    if args.max_total_tokens is None:
        return None
    return ratio_tokens(args.max_total_tokens, args.swa_full_tokens_ratio, args.page_size or 256)


V0_5_17 = SGLangVersion(
    number="0.5.17",
    answers={
        probes.SERVER_ARGS: True,
        probes.SERVE: False,
        probes.SMALL_POOL: False,
        probes.STATE_POOLS: False,
        probes.NORM_ROPE: False,
        probes.REPLAY: False,
    },
    resolve=f"{_SRT}.server_args.ServerArgs.__post_init__",
    is_resolved=lambda args: False,
    view=lambda args: args,
    serve_hooks=(Hook("sglang.cli.serve._extract_model_type_override", _serve_kind, "AFTER"),),
    hooks=(),
    names={
        f"{_POOL}._make_attn_state_pool": "overridden: no native stream state is allocated",
        f"{_POOL}._make_indexer_state_pool": "overridden: no native stream state is allocated",
    },
    ops={
        "q_norm_rope": (f"{_OPS}.attention.dsv4.elementwise.fused_q_norm_rope", f"{_SRT}.models.deepseek_v4.fused_q_norm_rope"),
        "rope_inplace": (
            f"{_OPS}.attention.dsv4.elementwise.fused_rope_inplace",
            f"{_SRT}.models.deepseek_v4.fused_rope_inplace",
        ),
        "silu_and_mul_clamp": (
            f"{_OPS}.attention.dsv4.moe.silu_and_mul_clamp",
            f"{_SRT}.models.deepseek_v2.silu_and_mul_clamp",
        ),
    },
    refusals=(),
    window_tokens=_window_tokens,
    window_share=lambda sizes: sizes.swa_ratio,
    asked_window_tokens=_asked_window_tokens,
    window_advice="raise --max-total-tokens or --swa-full-tokens-ratio (their product decides; SGLang takes 0.1 where the ratio "
    "is unset or 0.8)",
    check_pool=lambda pool: None,
    begin_without_server=lambda: None,
    prefix_cache=lambda tree: type(tree).__name__,
)
