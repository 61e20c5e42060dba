"""The same flush by SGLang's own CUDA kernels, where its package and a CUDA compiler are installed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_dsv4.bench.cases import EPS, PAGE_TOKENS, Case
from sglang_dsv4.spec import CSA_RATIO

if TYPE_CHECKING:
    from sglang_dsv4.bench.flush import FlushWork

MODULE = "sglang.kernels.ops.attention.dsv4.compress"


class Compressor:
    """One compressor's tensors in SGLang's layout. Its score state is raw; our slot bias serves as its position bias."""

    def __init__(self, module: Any, case: Case, work: "FlushWork", part: Any) -> None:
        step, ratio = work.step, work.ratio
        device = step.seq_lens.device
        self.module, self.part, self.ratio, self.dim = module, part, ratio, part.params.norm_weight.shape[0]
        self.page_size = PAGE_TOKENS // ratio
        pages = step.num_window_rows // PAGE_TOKENS
        is_csa = ratio == CSA_RATIO
        ring = 2 * ratio if is_csa else ratio
        state_rows = (pages if is_csa else len(case.starts)) * ring
        self.state = torch.randn(state_rows // ratio, ratio, part.kv_score.shape[1], device=device)
        page_bytes = 132 * self.page_size if self.dim == 128 else -(-584 * self.page_size // 576) * 576
        self.pool = torch.zeros(pages, page_bytes, dtype=torch.uint8, device=device)
        slots = torch.arange(PAGE_TOKENS, dtype=torch.int32, device=device)
        tokens = (step.history_pages.to(torch.int32).unsqueeze(-1) * PAGE_TOKENS + slots).flatten(1).contiguous()
        common = {
            "compress_ratio": ratio,
            "req_pool_indices": torch.arange(len(case.starts), device=device),
            "req_to_token": tokens,
            "full_to_state": torch.arange(step.num_window_rows, device=device),
            "swa_page_size": PAGE_TOKENS,
            "ring_size": ring,
        }
        if all(count == 1 for count in case.extends):
            self.plan = module.CompressorDecodePlan.generate(seq_lens=step.seq_lens, **common)
        else:
            # From host lengths, as SGLang plans a prefill: from lengths on the device the plan is padded to one work item
            # a token, and its kernels spend their time on the padding.
            self.plan = module.CompressorPrefillPlan.generate(
                seq_lens=step.seq_lens.cpu(), extend_lens=step.extend_lens.cpu(), num_q_tokens=case.num_tokens, **common
            )
        self.out_loc = tokens[step.token_rows, step.positions].long() // ratio
        self.out = torch.zeros(self.plan[1].shape[0], self.dim, device=device)
        self.freqs = torch.complex(*part.params.cos_sin.chunk(2, dim=1)).contiguous()

    def run(self) -> None:
        """Compress, then norm, RoPE, quantise and store: two launches."""
        params = self.part.params
        self.module.compress_forward(
            self.state,
            self.part.kv_score,
            params.slot_bias,
            self.plan,
            head_dim=self.dim,
            compress_ratio=self.ratio,
            out=self.out,
        )
        self.module.compress_norm_rope_store(
            self.out,
            self.plan,
            norm_weight=params.norm_weight,
            norm_eps=EPS,
            freq_cis=self.freqs,
            out_loc=self.out_loc,
            kvcache=self.pool,
            page_size=self.page_size,
        )


def compressors(module: Any, case: Case, work: "FlushWork") -> list[Compressor]:
    """SGLang's side of a layer."""
    return [Compressor(module, case, work, part) for part in work.parts.values()]


def run(parts: Sequence[Compressor]) -> None:
    """All launches of a layer."""
    for part in parts:
        part.run()
