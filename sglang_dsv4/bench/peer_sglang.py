"""The same work by SGLang's own CUDA kernels, where its package and a CUDA compiler are there."""

import importlib
from collections.abc import Callable

import torch

from sglang_dsv4.bench.cases import PAGE_TOKENS, Case
from sglang_dsv4.bench.work import EPS, FlushWork
from sglang_dsv4.spec import CSA_RATIO, HCA_RATIO

_MODULE = "sglang.kernels.ops.attention.dsv4.compress"


def load() -> tuple[object | None, str]:
    """SGLang's module, or None and why not."""
    try:
        return importlib.import_module(_MODULE), ""
    except ImportError as error:
        return None, f"{_MODULE}: {error}"


def _page_bytes(dim: int, rows: int) -> int:
    if dim == 128:
        return 132 * rows
    return -(-584 * rows // 576) * 576


class _Compressor:
    """One compressor's tensors in SGLang's layout. Its score state is raw, its position bias is our slot bias."""

    def __init__(self, module: object, case: Case, work: FlushWork, part: object, ratio: int) -> None:
        step = work.step
        device = step.seq_lens.device
        dim = part.params.norm_weight.shape[0]
        self.ratio, self.dim, self.module, self.part = ratio, dim, module, part
        per_page = PAGE_TOKENS // ratio
        pages = step.num_window_rows // PAGE_TOKENS
        ring = 2 * CSA_RATIO if ratio == CSA_RATIO else HCA_RATIO
        width = part.kv_score.shape[1]
        state_rows = pages * ring if ratio == CSA_RATIO else case.num_requests * ring
        self.state = torch.randn(state_rows // ratio, ratio, width, device=device)
        self.pool = torch.zeros(pages, _page_bytes(dim, per_page), dtype=torch.uint8, device=device)
        self.page_size = per_page
        slots = torch.arange(PAGE_TOKENS, dtype=torch.int32, device=device)
        tokens = step.history_pages.to(torch.int32).unsqueeze(-1) * PAGE_TOKENS + slots
        req_to_token = tokens.flatten(1).contiguous()
        identity = torch.arange(step.num_window_rows, device=device)
        requests = torch.arange(case.num_requests, device=device)
        common = {
            "compress_ratio": ratio,
            "req_pool_indices": requests,
            "req_to_token": req_to_token,
            "full_to_state": identity,
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
        location = req_to_token[step.token_rows, step.positions].long()
        self.out_loc = location // ratio
        self.out = torch.zeros(self.plan[1].shape[0], dim, device=device)
        cos, sin = part.params.cos_sin.chunk(2, dim=1)
        self.freqs = torch.complex(cos, sin).contiguous()

    def run(self) -> None:
        """Compress, then norm, RoPE, quantise and store: two launches."""
        self.module.compress_forward(
            self.state,
            self.part.kv_score,
            self.part.params.slot_bias,
            self.plan,
            head_dim=self.dim,
            compress_ratio=self.ratio,
            out=self.out,
        )
        self.module.compress_norm_rope_store(
            self.out,
            self.plan,
            norm_weight=self.part.params.norm_weight,
            norm_eps=EPS,
            freq_cis=self.freqs,
            out_loc=self.out_loc,
            kvcache=self.pool,
            page_size=self.page_size,
        )


def prepare(module: object, case: Case, work: FlushWork) -> tuple[Callable[[], None], list[_Compressor]]:
    """The layer's launches, and the objects behind them."""
    parts = [part for part in (work.main, work.index) if part is not None]
    compressors = []
    for part in parts:
        ratio = HCA_RATIO if part.boundary is part.streams else CSA_RATIO
        compressors.append(_Compressor(module, case, work, part, ratio))

    def run() -> None:
        for compressor in compressors:
            compressor.run()

    return run, compressors
