"""DeepSeek-V4 model ops of SGLang in plain torch, for any device. Arithmetic is fp32; each result is rounded once.

Every function has the signature of the SGLang function that it replaces, which is why some write into an argument.
"""

from typing import Any

import torch
import torch.nn.functional as F

from dsv4_kernels.norm_rope import naive_rms_norm, naive_rope
from sglang_dsv4.errors import UnsupportedError


def _cos_sin(freqs_cis: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    angles = freqs_cis[positions.long()]  # [T, R/2]
    return torch.cat([angles.real, angles.imag], dim=-1)  # [T, R]


def q_norm_rope(
    q_input: torch.Tensor, q_output: torch.Tensor, eps: float, freqs_cis: torch.Tensor, positions: torch.Tensor
) -> None:
    """Normalise each query head, without a weight, and rotate its last channels.

    Equation:
        q_output = RoPE(q / sqrt(mean(q^2) + eps), positions)      [NORM], [ROPE]

    Args:
        q_input (torch.Tensor): ``[T, H, D]``, bf16 or fp32, ``D`` a power of two.
        q_output (torch.Tensor): ``[T, H, D]``, written; any strides.
        eps (float): > 0.
        freqs_cis (torch.Tensor): ``[max_positions, R/2]``, complex64: cos + i sin.
        positions (torch.Tensor): ``[T]``, int32 or int64.
    """
    q_output.copy_(naive_rope(naive_rms_norm(q_input, None, eps), _cos_sin(freqs_cis, positions)))


def rope_inplace(
    q: torch.Tensor, k: torch.Tensor | None, freqs_cis: torch.Tensor, positions: torch.Tensor, inverse: bool = False
) -> None:
    """Rotate rows in place, in interleaved pairs.

    Equation:
        (x[2i], x[2i+1]) <- (x[2i] cos - x[2i+1] sin, x[2i] sin + x[2i+1] cos)      [ROPE]

    Args:
        q (torch.Tensor): ``[T, H, R]``, bf16 or fp32, any strides; overwritten.
        k (torch.Tensor | None): ``[T, H_k, R]``, likewise.
        freqs_cis (torch.Tensor): ``[max_positions, R/2]``, complex64.
        positions (torch.Tensor): ``[T]``, int32 or int64.
        inverse (bool): rotate by the negative angle.
    """
    cos_sin = _cos_sin(freqs_cis, positions)
    for rows in (q, k):
        if rows is not None:
            rows.copy_(naive_rope(rows, cos_sin, inverse=inverse))


def clamped_swiglu(gate_up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Gate one half of the channels by the other, both bounded.

    Equation:
        y = silu(min(gate, L)) * clamp(up, -L, L)

    Args:
        gate_up (torch.Tensor): ``[T, 2 I]``, bf16 or fp32: gate, then up.
        limit (float | None): L > 0; None for no bound.

    Returns:
        torch.Tensor: ``[T, I]``, dtype of ``gate_up``.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (F.silu(gate) * up).to(gate_up.dtype)


def silu_and_mul_clamp(input: torch.Tensor, output: torch.Tensor, swiglu_limit: float) -> None:
    """Write `clamped_swiglu` of ``input`` into ``output``.

    Args:
        input (torch.Tensor): ``[T, 2 I]``, bf16 or fp32; named as in SGLang.
        output (torch.Tensor): ``[T, I]``, written.
        swiglu_limit (float): L > 0.
    """
    output.copy_(clamped_swiglu(input, swiglu_limit))


def hc_split_sinkhorn(
    mixes: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    hc_mult: int = 4,
    sinkhorn_iters: int = 20,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn the mixing logits of the residual streams into weights.

    Equation, with n = ``hc_mult`` and logits z = mixes * scale + base of each of the three parts:
        pre  = sigmoid(z[:n]) + eps
        post = 2 sigmoid(z[n:2n])
        comb = softmax over columns of z[2n:] as [n, n], + eps; then columns, and ``sinkhorn_iters - 1`` times rows and
               columns, divided by their sum + eps

    Args:
        mixes (torch.Tensor): ``[B, S, (2 + n) n]``, fp32.
        hc_scale (torch.Tensor): ``[3]``, fp32: of pre, post, comb.
        hc_base (torch.Tensor): ``[(2 + n) n]``, fp32.
        hc_mult (int): residual streams n.
        sinkhorn_iters (int): >= 1.
        eps (float): > 0.

    Returns:
        tuple[torch.Tensor, torch.Tensor, torch.Tensor]: pre ``[B, S, n]``, post ``[B, S, n]``, comb ``[B, S, n, n]``.
    """
    sizes = (hc_mult, hc_mult, hc_mult * hc_mult)
    logits = [
        part * scale + base
        for part, scale, base in zip(mixes.split(sizes, dim=-1), hc_scale, hc_base.split(sizes), strict=True)
    ]
    pre = torch.sigmoid(logits[0]) + eps
    post = 2 * torch.sigmoid(logits[1])
    comb = logits[2].unflatten(-1, (hc_mult, hc_mult)).softmax(dim=-1) + eps  # [B, S, n, n]
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(sinkhorn_iters - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return pre, post, comb


def hc_head(
    x: torch.Tensor, hc_fn: torch.Tensor, hc_scale: torch.Tensor, hc_base: torch.Tensor, norm_eps: float, hc_eps: float
) -> torch.Tensor:
    """Collapse the residual streams before the final norm.

    Equation:
        m = (x_flat / sqrt(mean(x_flat^2) + norm_eps)) hc_fn^T
        y = sum_j (sigmoid(m_j scale + base_j) + hc_eps) x_j

    Args:
        x (torch.Tensor): ``[T, n, d]``, bf16 or fp32.
        hc_fn (torch.Tensor): ``[n, n d]``, fp32.
        hc_scale (torch.Tensor): ``[1]``, fp32.
        hc_base (torch.Tensor): ``[n]``, fp32.
        norm_eps (float): > 0.
        hc_eps (float): > 0.

    Returns:
        torch.Tensor: ``[T, d]``, dtype of ``x``.
    """
    streams = x.float()
    flat = streams.flatten(1)  # [T, n d]
    scale = torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + norm_eps)
    weights = torch.sigmoid(F.linear(flat, hc_fn) * scale * hc_scale + hc_base) + hc_eps  # [T, n]
    return (weights.unsqueeze(-1) * streams).sum(dim=1).to(x.dtype)


def mhc_combine(x_flat: torch.Tensor, pre: torch.Tensor, hc: int, out_dtype: torch.dtype) -> torch.Tensor:
    """Add up the residual streams by their weights.

    Equation:
        y = sum_k pre_k x_k

    Args:
        x_flat (torch.Tensor): ``[T, hc d]``, bf16 or fp32: stream after stream.
        pre (torch.Tensor): ``[T, hc]``, fp32.
        hc (int): residual streams.
        out_dtype (torch.dtype): of the result.

    Returns:
        torch.Tensor: ``[T, d]``.
    """
    return (pre.float().unsqueeze(-1) * x_flat.float().unflatten(1, (hc, -1))).sum(dim=1).to(out_dtype)


def no_rope_wrapper(*_: Any, **__: Any) -> None:
    """Make no module for RoPE: on a CPU DeepSeek-V4's layers rotate by `freqs_cis`, and nothing reads it."""


def router_logits(
    gate: Any, hidden_states: torch.Tensor, gemm_output_zero_allocator: Any = None, forward_batch: Any = None
) -> torch.Tensor:
    """Score the routed experts, in fp32 whatever the dtype of the model.

    Equation:
        logits = x W^T

    Args:
        gate (Any): SGLang's MoEGate, with ``weight`` ``[E, d]``.
        hidden_states (torch.Tensor): ``[T, d]``, bf16 or fp32.
        gemm_output_zero_allocator (Any): unused; workspace of a GPU kernel.
        forward_batch (Any): unused.

    Returns:
        torch.Tensor: ``[T, E]``, fp32.
    """
    del gemm_output_zero_allocator, forward_batch
    return F.linear(hidden_states.float(), gate.weight.float())


def routed_experts(layer: Any, x: torch.Tensor, topk_output: Any, moe_runner_config: Any) -> torch.Tensor:
    """Run each token through its chosen experts and add up what they say.

    Equation:
        y_t = sum_k w_tk W2_e clamped_swiglu(W13_e x_t),   e = id_tk

    The sum runs over experts in ascending order, in fp32, whatever tokens are in the batch.

    Args:
        layer (Any): SGLang's FusedMoE, with ``w13_weight`` ``[E, 2 I, d]`` (gate, then up) and ``w2_weight`` ``[E, d, I]``.
        x (torch.Tensor): ``[T, d]``, bf16 or fp32.
        topk_output (Any): weights ``[T, K]`` fp32, expert ids ``[T, K]`` (-1: none), and one more that is unused.
        moe_runner_config (Any): SGLang's MoeRunnerConfig; ``swiglu_limit`` is the bound L, or None.

    Returns:
        torch.Tensor: ``[T, d]``, dtype of ``x``.

    Raises:
        UnsupportedError: an expert layer that is not DeepSeek-V4's.
    """
    _check_experts(layer, moe_runner_config)
    weights, ids = topk_output[0].float(), topk_output[1]
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)  # [T, d]
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        tokens, choices = torch.where(ids == expert)
        hidden = clamped_swiglu(F.linear(x[tokens], layer.w13_weight[expert]), moe_runner_config.swiglu_limit)
        said = F.linear(hidden, layer.w2_weight[expert]).float() * weights[tokens, choices, None]
        total.index_add_(0, tokens, said)
    return total.to(x.dtype)


def _check_experts(layer: Any, config: Any) -> None:
    if config.activation != "silu" or config.gemm1_alpha is not None or config.apply_router_weight_on_input:
        raise UnsupportedError(
            "routed experts: expected activation silu, gemm1_alpha None and apply_router_weight_on_input False, got "
            f"{config.activation}, {config.gemm1_alpha} and {config.apply_router_weight_on_input}"
        )
    biases = [name for name in ("w13_weight_bias", "w2_weight_bias") if getattr(layer, name, None) is not None]
    if biases:
        raise UnsupportedError(f"routed experts: expected no bias, got {', '.join(biases)}")


def widen_bf16_parameters(model: torch.nn.Module, dtype: torch.dtype) -> list[str]:
    """Bring the parameters that SGLang always keeps in bf16 to the model's dtype. Exact: every bf16 number is an fp32 one.

    Args:
        model (torch.nn.Module): SGLang's DeepseekV4ForCausalLM, loaded.
        dtype (torch.dtype): the model's dtype.

    Returns:
        list[str]: names of the parameters that were widened; none for a bf16 model.

    Raises:
        UnsupportedError: the dtype is neither bf16 nor fp32, so that widening would not be exact.
    """
    if dtype == torch.bfloat16:
        return []
    if dtype != torch.float32:
        raise UnsupportedError(f"--dtype {dtype}: expected bfloat16 or float32")
    narrow = [(name, parameter) for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16]
    for _, parameter in narrow:
        parameter.data = parameter.data.to(dtype)
    return [name for name, _ in narrow]
