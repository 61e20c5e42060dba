"""Every option of SGLang whose name speaks of a cache, memory, attention or drafts, and what becomes of it with ours.

`plugin.install.refusals` has those that are refused. A new version's new option is in none of these, and a test fails until
somebody has read what it does.
"""

import re

SPEAKS_OF_A_CACHE = re.compile(
    "cache|kv|swa|radix|hicache|mem_|memory|spec|unified|hisparse|page|prefix|offload|disagg|c128|dsv4|dsa|indexer|evict|embed"
    "|chunk|canary|session|retract|total_tokens|prefill|decode|attention|attn|replay|mis$|layout|cp_|dcp|linker|kernel"
)

# Served: the option decides what SGLang's scheduler, allocators and prefix cache do, and ours follows page ids and lengths.
SERVED = [
    "attention_backend",
    "chunked_prefill_size",
    "context_length",
    "cuda_graph_bs_decode",
    "cuda_graph_max_bs_decode",
    "disable_chunked_prefix_cache",
    "disable_decode_cuda_graph",
    "disable_prefill_cuda_graph",
    "disable_radix_cache",
    "enable_cache_report",
    "enable_mixed_chunk",
    "enable_session_radix_cache",
    "kv_events_config",
    "max_prefill_tokens",
    "max_total_tokens",
    "mem_fraction_static",
    "num_continuous_decode_steps",
    "num_reserved_decode_tokens",
    "prefill_decode_interval",
    "prefill_decode_interval_min_bs",
    "prefill_max_requests",
    "radix_eviction_policy",
    "radix_eviction_policy_config",
    "retraction_policy",
    "strip_thinking_cache",
    "swa_full_tokens_ratio",
    "swa_prefix_tails",
    "decode_log_interval",
    "_radix_eviction_policy_explicitly_set",
    "_swa_full_tokens_ratio_explicitly_set",
    "enable_prefill_delayer",
    "min_free_slots_delay",
]

# Without effect unless another option is set that is refused: its name, and the names that go with it.
GOES_WITH = {
    "speculative_algorithm": "speculative_.* decoupled_spec_.* spec_trace_dir _speculative_draft_quantization_explicitly_set "
    "enable_linear_replayssm_spec enable_draft_weights_cpu_backup decrypted_draft_config_file enable_multi_layer_eagle",
    "disaggregation_mode": "disaggregation_.* enable_pd_role_switch optimistic_prefill_attempts",
    "enable_hierarchical_cache": "hicache_.*",
    "enable_hisparse": "hisparse_config",
    "enable_lmcache": "lmcache_config_file",
    "enable_flexkv": "flexkv_config_file",
    "enable_unified_cache_external_linker": "unified_cache_external_linker_.* enable_linker_mla_dedup",
    "kv_canary": "kv_canary_.*",
    "kv_cache_dtype": "prefill_kv_cache_dequant_dtype",
    "enable_prefill_cp": "cp_strategy prefill_cp_mode dsa_prefill_cp_mode enable_dsa_prefill_context_parallel enable_cp_.* "
    "enable_prefill_context_parallel enable_dsa_cache_layer_split",
    "dcp_size": "dcp_comm_backend dcp_replicate_q_proj",
    "pp_size": "enable_dynamic_chunking",
    "enable_dp_attention": "attn_dp_size enable_dp_attention_local_control_broadcast disable_attn_tp_gather",
    "cuda_graph_backend_prefill": "cuda_graph_bs_prefill cuda_graph_max_bs_prefill cuda_graph_max_seq_len_prefill "
    "cuda_graph_prefill_max_context",
    "enable_memory_saver": "enable_weights_cpu_backup",
}

# About another model, weights, images, requests or logs; no row of this cache depends on it.
ELSEWHERE = [
    "c128_page_size",
    "cpu_offload_gb",
    "offload_.*",
    "ple_offload_.*",
    "dsa_.*",
    "enable_dsa_.*",
    "qsa_indexer_dtype",
    "enable_paged_experts",
    "paged_experts_num_resident",
    "enable_attn_tp_input_scattered",
    "enable_dense_mlp_attn_tp",
    "enable_shared_experts_attn_tp",
    "enable_int8_mamba_checkpoint",
    "enable_linear_replayssm",
    "enable_mamba_cache_stochastic_rounding",
    "linear_attn_.*",
    "linear_replayssm_cache_len",
    "mamba_.*",
    "max_mamba_cache_size",
    "uses_mamba_radix_cache",
    "enable_precise_embedding_interpolation",
    "enable_prefix_mm_cache",
    "mm_.*",
    "enable_mm_.*",
    "enable_.*_mm_.*",
    "disable_outlines_disk_cache",
    "weight_cache_.*",
    "weight_loader_drop_cache_after_load",
    "keep_mm_feature_on_device",
    "enable_symm_mem",
    "enable_torch_symm_mem",
    "triton_attention_.*",
    "enable_lean_attention",
    "flashinfer_mla_disable_ragged",
    "asr_.*session.*",
    "priority_.*",
    "checkpoint_engine.*",
    "prefill_delayer_.*",
    "max_lora_chunk_size",
    "enable_return_.*",
    "uvicorn_access_log_exclude_prefixes",
    "eplb_rebalance_layers_per_chunk",
    "lora_eviction_policy",
    "disable_tokenizer_batch_decode",
    "disable_aiter_allreduce_fusion_in_.*",
]


def kind_of(name: str, refused: set[str]) -> str | None:
    """``refused``, ``served``, ``goes with ...`` or ``elsewhere``; None where nobody has read what the option does."""
    if name in refused:
        return "refused"
    if name in SERVED:
        return "served"
    for needed, patterns in GOES_WITH.items():
        if any(re.fullmatch(pattern, name) for pattern in patterns.split()):
            return f"goes with {needed}"
    if any(re.fullmatch(pattern, name) for pattern in ELSEWHERE):
        return "elsewhere"
    return None
