"""What the plug-in does not serve, each with its reason. Nothing falls back to SGLang's own cache."""

from dataclasses import dataclass
from typing import Any

from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install import versions
from sglang_dsv4.plugin.install.checkpoint import PAGE_TOKENS
from sglang_dsv4.plugin.install.versions.interface import Refusal

MIN_WINDOW_TOKENS = 4 * PAGE_TOKENS

_ONE_PROCESS = "the cache needs a request's tokens in one process"
_NO_OTHER_STORE = "boundary state is not copied to another store yet"
_WINDOW_PAGES = "window pages are pages of SGLang's sliding-window pool"

# Of every version; what one version alone has stands there.
REFUSALS = (
    Refusal("--page-size", f"pages of DeepSeek-V4 hold {PAGE_TOKENS} tokens in SGLang", (PAGE_TOKENS,)),
    Refusal("--disaggregation-mode", "stream and boundary state are not sent from prefill to decode servers yet", ("null",)),
    Refusal("--enable-hisparse", "entries stay in one pool; they are not offloaded"),
    Refusal("--enable-hierarchical-cache", "boundary state is not copied to the host tier yet"),
    Refusal("--enable-lmcache", _NO_OTHER_STORE),
    Refusal("--enable-flexkv", _NO_OTHER_STORE),
    Refusal("--radix-cache-backend", "a prefix cache that is not SGLang's own was never run"),
    Refusal("--disable-hybrid-swa-memory", _WINDOW_PAGES),
    Refusal("--enable-unified-memory", _WINDOW_PAGES),
    Refusal("--enable-page-major-kv-layout", "the cache lays out its own pages"),
    Refusal("--prefill-only-disable-kv-cache", "attention reads the cache"),
    Refusal("--is-embedding", "the model's embeddings were never compared with anything"),
    Refusal("--enable-mis", "attention would see the items of a request that must not see each other"),
    Refusal("--enable-streaming-session", "a turn would go on in its request's slot from any length, which was never run"),
    Refusal("--kv-canary", "it marks rows of SGLang's own pool; --dsv4-check compares checksums of ours", ("none",)),
    Refusal("--enable-return-indexer-topk", "the indexer's choice is not handed to SGLang, which would answer zeros"),
    Refusal("--quantization-param-path", "every row carries its own scales"),
    Refusal("--pp-size", "the cache holds all layers of the model", (1,)),
    Refusal("--enable-prefill-cp", _ONE_PROCESS),
    Refusal("--attn-cp-size", _ONE_PROCESS, (1,)),
    Refusal("--dcp-size", _ONE_PROCESS, (1,)),
    Refusal(
        "--speculative-algorithm",
        "rejected draft tokens cannot be rolled back yet: the draft's steps would need a cache of their own, and window rows "
        "and state a truncation that SGLang does not ask for",
    ),
    Refusal("--enable-two-batch-overlap", "a step has one plan"),
    Refusal("--enable-deepseek-v4-fp4-indexer", "index keys are stored as bf16 or fp8 (--dsv4-index-format)"),
    Refusal("--kv-cache-dtype", "row formats are chosen by --dsv4-kv-format", ("auto", "fp8_e4m3")),
    Refusal("--prefill-attention-backend", "one backend fills and reads the cache", ("dsv4",)),
    Refusal("--decode-attention-backend", "one backend fills and reads the cache", ("dsv4",)),
    Refusal("--enable-dp-attention", "it pads batches, which was never run here"),
    Refusal("--enable-deterministic-inference", "its sampler was never run with the portable ops"),
    Refusal("--use-ray", "Ray's schedulers do not load plug-ins"),
    Refusal(
        "--tokenizer-worker-num",
        "further tokenizer processes do not load plug-ins, and token ids outside the vocabulary would pass",
        (1,),
    ),
    Refusal("--enable-pdmux", "prefill and decode at the same time would share the kernels' scratch"),
    Refusal("--enable-torch-compile", "what it compiles would keep the plan of one step"),
    Refusal("--enable-memory-saver", "the cache's memory cannot be given back for a time"),
    Refusal("--debug-cuda-graph", "decode steps are captured whole or not at all"),
    Refusal(
        "--cuda-graph-backend-prefill",
        "a prefill's plan depends on its lengths; SGLang captures none of DeepSeek-V4 either unless told to",
        ("disabled",),
    ),
    Refusal("--cuda-graph-backend-decode", "decode steps are captured whole or not at all", ("full", "disabled")),
    Refusal("--dllm-algorithm", "the model is autoregressive"),
)


@dataclass(frozen=True)
class RefusedVariable:
    """One environment variable by which SGLang would lay out a cache of its own.

    Attributes:
        name (str): of the variable.
        reason (str): why it cannot be served.
        allowed (tuple[str, ...]): values, in small letters, that ask for nothing.
    """

    name: str
    reason: str
    allowed: tuple[str, ...]


_LAYOUT = "the layout of rows is chosen by --dsv4-kv-format"
_OFF = ("0", "false", "no", "n", "off")
REFUSED_VARIABLES = (
    RefusedVariable("SGLANG_DSV4_KV_LAYOUT", _LAYOUT, ("v4",)),
    RefusedVariable("SGLANG_DSV4_COMPRESSED_KV_LAYOUT", _LAYOUT, ("auto", "v4")),
    RefusedVariable("SGLANG_DSV4_UNIFIED_KV_FP8", _LAYOUT, _OFF),
    RefusedVariable("SGLANG_OPT_USE_ONLINE_COMPRESS", "the state of a stream has one layout", _OFF),
)


def check_arguments(args: Any) -> None:
    """Refuse server arguments that ask for a feature this plug-in does not serve.

    Args:
        args (Any): parsed flags, or a ServerArgs as the version in use is to be read.

    Raises:
        UnsupportedError: names the option, its value and the reason.
    """
    for refusal in (*REFUSALS, *versions.installed().refusals):
        if refusal.is_set(args):
            raise UnsupportedError(
                f"{refusal.option} {getattr(args, refusal.field)}: not supported with --enable-dsv4-compressed-kv: "
                f"{refusal.reason}"
            )


def check_environment() -> None:
    """Refuse environment variables that ask SGLang for another layout of the cache.

    Raises:
        UnsupportedError: names the variable, its value and the reason.
    """
    for variable in REFUSED_VARIABLES:
        value = env.get(variable.name)
        if value is not None and value.lower() not in variable.allowed:
            raise UnsupportedError(
                f"{variable.name}={value}: not supported with --enable-dsv4-compressed-kv: {variable.reason}"
            )


def check_window_pool(window_tokens: int) -> None:
    """Refuse a pool of window pages with which SGLang's scheduler would wait for ever.

    A prefix hit locks one page and admission asks for more than two; measured: with 768 tokens the first repeated prompt
    hangs, from 1,024 on every prompt is served.

    Args:
        window_tokens (int): tokens in SGLang's sliding-window pool.

    Raises:
        UnsupportedError: names the size and the options that decide it.
    """
    if window_tokens < MIN_WINDOW_TOKENS:
        raise UnsupportedError(
            f"window pool: expected {MIN_WINDOW_TOKENS} tokens or more, got {window_tokens}; "
            f"{versions.installed().window_advice}"
        )


def check_graphs(config: Any) -> None:
    """Refuse CUDA graphs that SGLang has resolved to, whatever option asked for them.

    Args:
        config (Any): SGLang's CudaGraphConfig.

    Raises:
        UnsupportedError: names the phase and what it would be captured by.
    """
    for phase, allowed in (("prefill", ("disabled",)), ("decode", ("full", "disabled"))):
        backend = getattr(config, phase).backend
        if backend not in allowed:
            raise UnsupportedError(
                f"CUDA graphs of {phase}: expected {' or '.join(allowed)}, got {backend}; see --cuda-graph-config"
            )
