"""Every name of SGLang that this plug-in touches in all versions, as data; `versions` has those of one alone."""

import pkgutil
from dataclasses import dataclass

from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install.versions.choose import distribution
from sglang_dsv4.plugin.install.versions.interface import SGLangVersion

_RESOLVE = "refuses what is not supported, for Engine too"


@dataclass(frozen=True)
class ContractName:
    """One name of SGLang.

    Attributes:
        path (str): dotted path of a module attribute or a class attribute.
        use (str): what the plug-in does with it.
    """

    path: str
    use: str

    def is_found(self) -> bool:
        """Whether this installation of SGLang has the name."""
        try:
            pkgutil.resolve_name(self.path)
        except (ImportError, AttributeError):
            return False
        return True


_SRT = "sglang.srt"
_MODEL = f"{_SRT}.models.deepseek_v4"
_POOL = f"{_SRT}.mem_cache.deepseek_v4_memory_pool.DeepSeekV4TokenToKVPool"

ADD_CLI_ARGS = f"{_SRT}.server_args.ServerArgs.add_cli_args"
FROM_CLI_ARGS = f"{_SRT}.server_args.ServerArgs.from_cli_args"
CHECK_ARGS = f"{_SRT}.server_args.ServerArgs.check_server_args"
BUILD_POOL = f"{_SRT}.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_dsv4_kv_pool"
POOL_GLOBAL = f"{_SRT}.mem_cache.kv_cache_configurator.DeepSeekV4TokenToKVPool"
POOL_SIZES = f"{_SRT}.model_executor.pool_configurator.DSV4PoolConfigurator.__init__"
FIT_POOLS = f"{_SRT}.model_executor.pool_configurator.DSV4PoolConfigurator.calculate_pool_sizes"
VALIDATE = f"{_SRT}.managers.tokenizer_manager.TokenizerManager._validate_one_request"
INTERNAL_STATE = f"{_SRT}.managers.scheduler.Scheduler.get_internal_state"
INIT_INFO = f"{_SRT}.managers.scheduler.Scheduler.get_init_info"
RUN_BATCH = f"{_SRT}.managers.scheduler.Scheduler.run_batch"
ON_IDLE = f"{_SRT}.managers.scheduler.Scheduler.on_idle"

CONTRACT = (
    ContractName(f"{_SRT}.plugins.hook_registry.HookRegistry.register", "wraps the functions below"),
    ContractName(ADD_CLI_ARGS, "adds the flags"),
    ContractName(FROM_CLI_ARGS, "reads the flags, and refuses what is not supported"),
    ContractName(CHECK_ARGS, "refuses arguments that were made before the plug-in was loaded"),
    ContractName(BUILD_POOL, "builds the pool over CompressedKVCache"),
    ContractName(POOL_GLOBAL, "rebound while the pool is built, so that SGLang passes its own arguments to ours"),
    ContractName(POOL_SIZES, "our bytes per token, for the size of the pools"),
    ContractName(FIT_POOLS, "how many tokens fit, by the bytes that our cache allocates"),
    ContractName(
        f"{_SRT}.model_executor.pool_configurator.DSV4PoolConfigurator._compute_dsv4_sizes",
        "sizes of SGLang's allocators for a number of tokens",
    ),
    ContractName(
        f"{_SRT}.model_executor.pool_configurator.DSV4PoolConfigurator._to_config", "the same as SGLang's configuration"
    ),
    ContractName(
        f"{_SRT}.model_executor.pool_configurator.DSV4PoolConfigurator._get_num_req_slots", "slots for a number of requests"
    ),
    ContractName(VALIDATE, "refuses embeddings, and token ids outside the vocabulary, which would end the server"),
    ContractName(f"{_SRT}.runtime_context.get_parallel", "how many ranks share the query heads"),
    ContractName(INTERNAL_STATE, "adds the memory report to /server_info"),
    ContractName(
        f"{_SRT}.managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver.get_pool_stats",
        "tells /server_info how many pages are in use",
    ),
    ContractName(INIT_INFO, "the last check before a scheduler takes requests; makes the metrics"),
    ContractName(RUN_BATCH, "counts a step for the metrics"),
    ContractName(ON_IDLE, "brings the metrics up to date when nothing runs"),
    ContractName(f"{_SRT}.managers.scheduler.Scheduler.is_fully_idle", "whether requests have open blocks"),
    ContractName(
        f"{_SRT}.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter",
        "tells whether --enable-metrics is set, and the labels of a scheduler",
    ),
    ContractName(f"{_SRT}.managers.schedule_batch.ScheduleBatch", "lengths and requests of a step, on the host"),
    ContractName(f"{_SRT}.entrypoints.warmup.warmup", "registers our warm-up"),
    ContractName(f"{_SRT}.managers.io_struct.GenerateReqInput", "a prompt of the warm-up"),
    ContractName(f"{_SRT}.managers.tokenizer_manager.TokenizerManager.generate_request", "sends it"),
    ContractName(f"{_SRT}.managers.tokenizer_manager.TokenizerManager.flush_cache", "forgets it"),
    ContractName(
        f"{_SRT}.mem_cache.base_prefix_cache.BasePrefixCache.full_protected_size",
        "history pages that requests share with the prefix cache",
    ),
    ContractName(f"{_SRT}.mem_cache.base_prefix_cache.BasePrefixCache.swa_protected_size", "such window pages"),
    ContractName(f"{_POOL}._make_kv_pool", "overridden: no native rows are allocated"),
    ContractName(f"{_POOL}._make_indexer_pool", "overridden: no native index keys are allocated"),
    ContractName(f"{_POOL}.set_swa_key_buffer_radix_fused_norm_rope", "overridden: writes window rows into our pool"),
    ContractName(f"{_POOL}.translate_loc_from_full_to_swa", "finds the window page of a token's page"),
    ContractName(f"{_SRT}.layers.attention.attention_registry.ATTENTION_BACKENDS", "the entry 'dsv4' becomes ours"),
    ContractName(f"{_SRT}.layers.attention.base_attn_backend.AttentionBackend", "base class of our backend"),
    ContractName(f"{_MODEL}.DeepseekV4ForCausalLM", "the model, unchanged"),
    ContractName(f"{_MODEL}.MQALayer", "its attention layers; window-only ones get an unscaled RoPE table"),
    ContractName(f"{_SRT}.layers.attention.dsv4.compressor.Compressor.compute_kv_score", "projections of a compressor"),
    ContractName(f"{_SRT}.layers.attention.dsv4.indexer.C4Indexer.compute_weights", "head weights of the indexer"),
    ContractName(f"{_SRT}.model_executor.forward_batch_info.ForwardBatch", "positions, lengths and slots of a step"),
    ContractName(
        f"{_SRT}.model_executor.runner.decode_cuda_graph_runner.build_replay_fb_view",
        "what the backend is told of a replay: padded lengths, and how many requests are padding",
    ),
    ContractName(
        f"{_SRT}.layers.attention.base_attn_backend.AttentionBackend.init_forward_metadata_out_graph",
        "overridden: plans a step before a graph replays it",
    ),
    ContractName(
        f"{_SRT}.layers.attention.base_attn_backend.AttentionBackend.init_forward_metadata_in_graph",
        "overridden: attention's own plan, which is captured",
    ),
)


def names_of(version: SGLangVersion) -> tuple[ContractName, ...]:
    """`CONTRACT`, and what the plug-in touches in this version alone."""
    return (*CONTRACT, ContractName(version.resolve, _RESOLVE), *(ContractName(*name) for name in version.names.items()))


def check_names(names: tuple[ContractName, ...]) -> None:
    """Refuse an SGLang that lacks a name of the contract.

    Raises:
        UnsupportedError: names everything that is missing.
    """
    missing = [name.path for name in names if not name.is_found()]
    if missing:
        raise UnsupportedError(f"sglang {distribution()}: expected by this plug-in, but missing: {', '.join(missing)}")
