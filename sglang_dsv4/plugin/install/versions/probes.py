"""Questions to the installed SGLang, by which the versions are told apart.

Most names exist in every version, some of them without effect; so a probe calls what it asks about, or looks for the place
where a decision is made. The first two are asked whenever SGLang loads its plug-ins, and import next to nothing; the others
when the cache was asked for.
"""

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace

SERVER_ARGS = "making a ServerArgs resolves it"
SERVE = "`sglang serve` asks a registry of servers"
SMALL_POOL = "a sliding-window pool of no page is an error"
STATE_POOLS = "one factory makes the state pools of all ratios"
NORM_ROPE = "RoPE stands beside the norm"
REPLAY = "a replayed step is told the token counts of all ranks"


def _resolves_at_once() -> bool:
    from sglang.srt.server_args import ServerArgs

    try:
        inspect.unwrap(ServerArgs.__post_init__)(SimpleNamespace())
    except AttributeError:
        return True
    return False


def _has_serve_registry() -> bool:
    return find_spec("sglang.cli.serve_backends") is not None


def _small_pool_is_an_error() -> bool:
    from sglang.srt.model_executor.pool_configurator import DSV4PoolConfigurator

    sizes = object.__new__(DSV4PoolConfigurator)
    vars(sizes).update(swa_ratio=0.1, c4_shrink_factor=1, swa_page_size=256, c4_ring_size=8)
    vars(sizes).update(_unified=False, swa_cap_tokens=None, sliding_window_size=128, operator_swa_ratio=None, ring_sizes={})
    try:
        sizes._compute_dsv4_sizes(256, 256)
    except ValueError:
        return True
    return False


def _has_one_state_factory() -> bool:
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

    return "head_dim" in inspect.signature(getattr(DeepSeekV4TokenToKVPool, "_make_compress_state_pool", _nothing)).parameters


def _nothing() -> None:
    """Stands for a factory that is not there."""


def _has_norm_rope() -> bool:
    return find_spec("sglang.kernels.ops.attention.dsv4.norm_rope") is not None


def _tells_token_counts() -> bool:
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import build_replay_fb_view

    return "global_num_tokens_cpu" in inspect.signature(build_replay_fb_view).parameters


EARLY: dict[str, Callable[[], bool]] = {SERVER_ARGS: _resolves_at_once, SERVE: _has_serve_registry}
LATE: dict[str, Callable[[], bool]] = {
    SMALL_POOL: _small_pool_is_an_error,
    STATE_POOLS: _has_one_state_factory,
    NORM_ROPE: _has_norm_rope,
    REPLAY: _tells_token_counts,
}


def ask(probes: dict[str, Callable[[], bool]]) -> dict[str, bool | str]:
    """The answers; in place of one that SGLang cannot give, what went wrong."""
    answers: dict[str, bool | str] = {}
    for name, probe in probes.items():
        try:
            answers[name] = probe()
        except (ImportError, AttributeError, TypeError, KeyError) as error:
            answers[name] = f"{type(error).__name__}: {error}"
    return answers
