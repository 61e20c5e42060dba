"""What the plug-in does not serve, each with its reason. Nothing falls back to SGLang's own cache."""

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.spec import CacheSpec

ARCHITECTURE = "DeepseekV4ForCausalLM"
PAGE_TOKENS = 256
MIN_WINDOW_TOKENS = 4 * PAGE_TOKENS
MIN_CAPABILITY = (8, 0)  # bf16 on tensor cores
PADDED_HEADS = 64  # SGLang fills the heads of a rank up to this many, for FlashMLA


@dataclass(frozen=True)
class Refusal:
    """One feature of SGLang that is refused.

    Attributes:
        option (str): what the user set, as on the command line.
        reason (str): why it cannot be served.
        is_set (Callable[[Any], bool]): whether these arguments ask for it.
    """

    option: str
    reason: str
    is_set: Callable[[Any], bool]


def _above_one(name: str) -> Callable[[Any], bool]:
    return lambda args: (getattr(args, name, None) or 1) > 1


def _flag(name: str) -> Callable[[Any], bool]:
    return lambda args: bool(getattr(args, name, False))


REFUSALS = (
    Refusal(
        "--page-size",
        f"pages of DeepSeek-V4 hold {PAGE_TOKENS} tokens in SGLang",
        lambda args: args.page_size not in (None, PAGE_TOKENS),
    ),
    Refusal(
        "--disaggregation-mode",
        "stream and boundary state are not sent from prefill to decode servers yet",
        lambda args: args.disaggregation_mode not in (None, "null"),
    ),
    Refusal("--enable-hisparse", "entries stay in one pool; they are not offloaded", _flag("enable_hisparse")),
    Refusal(
        "--enable-hierarchical-cache", "boundary state is not copied to the host tier yet", _flag("enable_hierarchical_cache")
    ),
    Refusal("--pp-size", "the cache holds all layers of the model", _above_one("pp_size")),
    Refusal("--enable-prefill-cp", "the cache needs a request's tokens in one process", _flag("enable_prefill_cp")),
    Refusal("--dcp-size", "the cache needs a request's tokens in one process", _above_one("dcp_size")),
    Refusal(
        "--speculative-algorithm",
        "rejected draft tokens cannot be rolled back yet: the draft's steps would need a cache of their own, and window rows "
        "and state a truncation that SGLang does not ask for",
        lambda args: args.speculative_algorithm is not None,
    ),
    Refusal("--enable-two-batch-overlap", "a step has one plan", _flag("enable_two_batch_overlap")),
    Refusal(
        "--enable-deepseek-v4-fp4-indexer",
        "index keys are stored as bf16 or fp8 (--dsv4-index-format)",
        _flag("enable_deepseek_v4_fp4_indexer"),
    ),
    Refusal(
        "--kv-cache-dtype",
        "row formats are chosen by --dsv4-kv-format",
        lambda args: args.kv_cache_dtype not in (None, "auto", "fp8_e4m3"),
    ),
    Refusal(
        "--prefill-attention-backend",
        "one backend fills and reads the cache",
        lambda args: getattr(args, "prefill_attention_backend", None) not in (None, "dsv4"),
    ),
    Refusal(
        "--decode-attention-backend",
        "one backend fills and reads the cache",
        lambda args: getattr(args, "decode_attention_backend", None) not in (None, "dsv4"),
    ),
    Refusal("--enable-dp-attention", "it pads batches, which was never run here", _flag("enable_dp_attention")),
    Refusal(
        "--enable-deterministic-inference",
        "its sampler was never run with the portable ops",
        _flag("enable_deterministic_inference"),
    ),
    Refusal("--use-ray", "Ray's schedulers do not load plug-ins", _flag("use_ray")),
    Refusal(
        "--tokenizer-worker-num",
        "further tokenizer processes do not load plug-ins, and token ids outside the vocabulary would pass",
        _above_one("tokenizer_worker_num"),
    ),
    Refusal("--enable-pdmux", "prefill and decode at the same time would share the kernels' scratch", _flag("enable_pdmux")),
    Refusal("--enable-torch-compile", "what it compiles would keep the plan of one step", _flag("enable_torch_compile")),
    Refusal("--enable-memory-saver", "the cache's memory cannot be given back for a time", _flag("enable_memory_saver")),
    Refusal("--debug-cuda-graph", "decode steps are captured whole or not at all", _flag("debug_cuda_graph")),
    Refusal(
        "--cuda-graph-backend-prefill",
        "a prefill's plan depends on its lengths; SGLang captures none of DeepSeek-V4 either unless told to",
        lambda args: getattr(args, "cuda_graph_backend_prefill", None) not in (None, "disabled"),
    ),
    Refusal(
        "--cuda-graph-backend-decode",
        "decode steps are captured whole or not at all",
        lambda args: getattr(args, "cuda_graph_backend_decode", None) not in (None, "full", "disabled"),
    ),
    Refusal("--dllm-algorithm", "the model is autoregressive", lambda args: bool(getattr(args, "dllm_algorithm", None))),
)


def check_arguments(args: Any) -> None:
    """Refuse server arguments that ask for a feature this plug-in does not serve.

    Args:
        args (Any): parsed flags or a ServerArgs.

    Raises:
        UnsupportedError: names the option, its value and the reason.
    """
    for refusal in REFUSALS:
        if refusal.is_set(args):
            name = refusal.option.removeprefix("--").replace("-", "_")
            raise UnsupportedError(
                f"{refusal.option} {getattr(args, name, None)}: not supported with --enable-dsv4-compressed-kv: {refusal.reason}"
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
            f"window pool: expected {MIN_WINDOW_TOKENS} tokens or more, got {window_tokens}; raise --max-total-tokens or "
            "--swa-full-tokens-ratio (their product decides; SGLang takes 0.1 where the ratio is unset or 0.8)"
        )


def window_tokens(max_total_tokens: int, ratio: float) -> int:
    """Tokens of SGLang's sliding-window pool, whole pages, as its pool configurator computes them."""
    full = max_total_tokens // PAGE_TOKENS * PAGE_TOKENS
    return int(full * ratio) // PAGE_TOKENS * PAGE_TOKENS


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


def compute_capability(device: str) -> tuple[int, int] | None:
    """Of an NVIDIA GPU; None for another device, or where the driver finds none."""
    if device.partition(":")[0] != "cuda" or torch.version.cuda is None:
        return None
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def check_device(device: str, capability: tuple[int, int] | None) -> None:
    """Refuse devices on which the plug-in cannot run.

    Args:
        device (str): as ``--device`` names it.
        capability (tuple[int, int] | None): of `compute_capability`.

    Raises:
        UnsupportedError: names the device and what works.
    """
    kind = device.partition(":")[0]
    if kind == "cpu":
        return
    if kind != "cuda":
        raise UnsupportedError(
            f"--device {device}: expected cpu or cuda; with --enable-dsv4-compressed-kv HIP, NPU and XPU were never run"
        )
    if capability is None:
        raise UnsupportedError(f"--device {device}: expected an NVIDIA GPU, torch finds none")
    if capability < MIN_CAPABILITY:
        found, least = (f"SM{major}{minor}" for major, minor in (capability, MIN_CAPABILITY))
        raise UnsupportedError(f"--device {device}: expected {least} or later, got {found}")


def handed_heads(num_heads: int, tp_size: int) -> int:
    """Query heads that SGLang's model hands to one rank's attention: its own, filled up to 64 or to all of them.

    Args:
        num_heads (int): query heads of the model.
        tp_size (int): ranks that share them.
    """
    if tp_size == 1:
        return num_heads
    return PADDED_HEADS if num_heads // tp_size <= PADDED_HEADS else num_heads


def is_unquantised(model_path: str) -> bool:
    """Whether a checkpoint's configuration names no quantisation."""
    config = json.loads((Path(model_path) / "config.json").read_text())
    return not config.get("quantization_config")


def query_heads(model_path: str, tp_size: int) -> int:
    """`handed_heads` of a checkpoint that `check_checkpoint` has accepted."""
    config = json.loads((Path(model_path) / "config.json").read_text())
    return handed_heads(config["num_attention_heads"], tp_size)


def check_attention(name: str | None, spec: CacheSpec, device: str, num_heads: int) -> str:
    """Refuse an attention that is not possible, before the model is loaded.

    Args:
        name (str | None): what was asked for; None takes the fastest that is possible.
        spec (CacheSpec): the cache's.
        device (str): where it will be.
        num_heads (int): of `handed_heads`.

    Returns:
        str: the attention that will be used.

    Raises:
        UnsupportedError: names the attention and why.
    """
    from sglang_dsv4.attention import choose_attention, find_capabilities

    try:
        chosen, _ = choose_attention(name, find_capabilities(torch.device(device), spec.row_format, num_heads))
    except ValueError as error:
        raise UnsupportedError(f"--dsv4-attention: {error}") from error
    return chosen.name


def check_checkpoint(model_path: str, options: dict[str, Any]) -> CacheSpec:
    """Refuse a checkpoint that is missing, or not of DeepSeek-V4.

    Args:
        model_path (str): a folder with a ``config.json``.
        options (dict[str, Any]): row and index format.

    Returns:
        CacheSpec: what the cache will hold.

    Raises:
        UnsupportedError: names the path and what was found there.
    """
    config_file = Path(model_path) / "config.json"
    if not config_file.is_file():
        raise UnsupportedError(f"--model-path {model_path}: expected a folder with a config.json, found none")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise UnsupportedError(f"--model-path {model_path}: config.json is not JSON: {error}") from error
    found = config.get("architectures") or ["none"]
    if ARCHITECTURE not in found:
        raise UnsupportedError(f"--model-path {model_path}: expected the architecture {ARCHITECTURE}, got {', '.join(found)}")
    return CacheSpec.from_hf(config, page_tokens=PAGE_TOKENS, **options)


def check_dtype(dtype: str, attention: str) -> None:
    """Refuse activations that the chosen attention does not take: the eager one computes in fp32, too, all others in bf16.

    Args:
        dtype (str): as ``--dtype`` names it; ``auto`` passes, and is checked again when SGLang has resolved it.
        attention (str): of `check_attention`.

    Raises:
        UnsupportedError: names both.
    """
    allowed = ("bfloat16", "float32") if attention == "eager" else ("bfloat16",)
    if {"float": "float32"}.get(dtype, dtype) not in ("auto", *allowed):
        raise UnsupportedError(f"--dtype {dtype}: expected {' or '.join(allowed)} with attention {attention}")


def check_port(host: str, port: int) -> None:
    """Refuse a port that another server holds, before the model is loaded.

    Raises:
        UnsupportedError: names the address and the system's reason.
    """
    reasons = list(_bind_failures(host, port))
    if reasons:
        raise UnsupportedError(f"--port {port}: expected a free port on {host}, but it is taken: {reasons[0]}")


def _bind_failures(host: str, port: int) -> Iterator[str]:
    # An unusable host name is SGLang's to report; here only the port matters.
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        return
    with socket.socket(family, kind, proto) as probe:
        # A server killed a moment ago leaves connections in TIME_WAIT; they must not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            yield str(error)
