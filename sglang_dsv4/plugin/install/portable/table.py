"""The portable ops, as data."""

from dataclasses import dataclass, replace
from typing import Any

from sglang_dsv4.plugin.install.portable import config_ops, model_ops, sampling_ops, scheduler_ops
from sglang_dsv4.plugin.install.versions.interface import SGLangVersion


@dataclass(frozen=True)
class PortableOp:
    """One function of SGLang and what stands in for it where it cannot run.

    Attributes:
        name (str): how it is called in logs.
        target (str): dotted path of the stock one: ``package.module.name`` or ``package.module.Class.name``.
        reason (str): what the stock one needs, or gets wrong, for a user to read.
        replacement (Any): called as the stock one is.
        needs (str): key of `capabilities.NEEDS`; the stock one stays where that need is met.
        seen_as (tuple[str, ...]): other paths by which SGLang's model and scheduler reach it.
    """

    name: str
    target: str
    reason: str
    replacement: Any
    needs: str
    seen_as: tuple[str, ...] = ()


_OPS = "sglang.kernels.ops"
_SRT = "sglang.srt"
_GRAMMAR = f"{_SRT}.constrained.xgrammar_backend"

# Where these stand is a matter of the version.
_MOVING = (
    PortableOp("q_norm_rope", "", "CUDA, compiled at run time", model_ops.q_norm_rope, "cuda_sm90"),
    PortableOp("rope_inplace", "", "CUDA, compiled at run time", model_ops.rope_inplace, "cuda_sm90"),
    PortableOp("silu_and_mul_clamp", "", "CUDA, compiled at run time, bf16 only", model_ops.silu_and_mul_clamp, "cuda_sm90"),
    PortableOp("rope_wrapper", "", "fails on a CPU for layers whose RoPE is not scaled", model_ops.no_rope_wrapper, "cuda"),
    PortableOp("mhc_combine", "", "Triton on a GPU", model_ops.mhc_combine, "triton_gpu"),
)
_FIXED = (
    PortableOp(
        name="hc_split_sinkhorn",
        target=f"{_OPS}.layernorm.mhc.hc_split_sinkhorn",
        reason="TileLang",
        replacement=model_ops.hc_split_sinkhorn,
        needs="tilelang",
    ),
    PortableOp(
        name="hc_head",
        target=f"{_OPS}.layernorm.mhc_head.fused_hc_head",
        reason="Triton on a GPU",
        replacement=model_ops.hc_head,
        needs="triton_gpu",
    ),
    PortableOp(
        name="router_logits",
        target=f"{_SRT}.models.deepseek_v2.MoEGate.forward",
        reason="off CUDA the stock one rounds expert scores to the model's dtype; on CUDA they are fp32",
        replacement=model_ops.router_logits,
        needs="cuda",
    ),
    PortableOp(
        name="routed_experts",
        target=f"{_SRT}.layers.moe.fused_moe_native.moe_forward_native",
        reason="the stock torch path leaves out the model's swiglu_limit",
        replacement=model_ops.routed_experts,
        needs="cuda",
    ),
    PortableOp(
        name="tensor_parallel_heads",
        target=f"{_SRT}.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        reason="the stock one pads the one row of keys to one per rank, which SGLang's own model then refuses",
        replacement=config_ops.keep_heads,
        needs="cuda",
        seen_as=(f"{_SRT}.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp",),
    ),
    PortableOp(
        name="alloc_extend",
        target=f"{_OPS}.memory.allocator.alloc_extend_kernel",
        reason="Triton on a GPU",
        replacement=scheduler_ops.alloc_extend,
        needs="triton_gpu",
        seen_as=(f"{_SRT}.mem_cache.allocator.paged.alloc_extend_kernel",),
    ),
    PortableOp(
        name="alloc_decode",
        target=f"{_OPS}.memory.allocator.alloc_decode_kernel",
        reason="Triton on a GPU",
        replacement=scheduler_ops.alloc_decode,
        needs="triton_gpu",
        seen_as=(f"{_SRT}.mem_cache.allocator.paged.alloc_decode_kernel",),
    ),
    PortableOp(
        name="support_triton",
        target=f"{_SRT}.utils.common.support_triton",
        reason="the stock one looks at the backend's name only; SGLang's own torch paths are taken instead of Triton",
        replacement=scheduler_ops.no_triton,
        needs="triton_gpu",
        seen_as=(f"{_SRT}.mem_cache.allocation.support_triton", f"{_SRT}.model_executor.forward_batch_info.support_triton"),
    ),
    PortableOp(
        name="grammar_bitmask",
        target=f"{_GRAMMAR}._allocate_token_bitmask",
        reason="memory pinned for a GPU; a request with a grammar would stop the server",
        replacement=sampling_ops.allocate_bitmask,
        needs="cuda",
    ),
    PortableOp(
        name="grammar_mask",
        target=f"{_GRAMMAR}.XGrammarGrammar.apply_vocab_mask",
        reason="Triton on a GPU; refuses logits on a CPU, which would stop the server",
        replacement=sampling_ops.mask_logits_of_grammar,
        needs="cuda",
    ),
    PortableOp(
        name="grammar_backend_mask",
        target=f"{_GRAMMAR}.XGrammarGrammarBackend.apply_vocab_mask",
        reason="Triton on a GPU; refuses logits on a CPU, which would stop the server",
        replacement=sampling_ops.mask_logits,
        needs="cuda",
    ),
    PortableOp(
        name="repetition_penalty",
        target=f"{_SRT}.sampling.penaltylib.repetition_penalty.apply_scaling_penalties",
        reason="compiled with a C++ compiler during the first request that uses it",
        replacement=sampling_ops.scale_penalties,
        needs="cuda",
        seen_as=(f"{_SRT}.sampling.sampling_batch_info.apply_scaling_penalties",),
    ),
)


def portable_ops(version: SGLangVersion) -> tuple[PortableOp, ...]:
    """Those that a version of SGLang has."""
    moved = (
        replace(op, target=version.ops[op.name][0], seen_as=version.ops[op.name][1:])
        for op in _MOVING
        if op.name in version.ops
    )
    return (*moved, *_FIXED)
