"""What is measured: which tokens of which requests one step holds, and random tensors of such a step."""

from dataclasses import dataclass

import torch

from dsv4_kernels.layout import ROPE_DIM, RowFormat
from dsv4_kernels.norm_rope import RopeSpec, rope_table
from dsv4_kernels.step import StepTensors

PAGE_TOKENS = 256
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        name (str): for people.
        starts (tuple[int, ...]): tokens each request had before.
        extends (tuple[int, ...]): new tokens of each request.
    """

    name: str
    starts: tuple[int, ...]
    extends: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """New tokens in all."""
        return sum(self.extends)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each request has after the step."""
        return [start + count for start, count in zip(self.starts, self.extends, strict=True)]

    @property
    def shape(self) -> str:
        """The numbers of requests and tokens."""
        return f"{len(self.starts)} requests, {self.num_tokens} tokens"

    def num_closed(self, ratio: int) -> int:
        """Blocks that the step closes."""
        return sum(length // ratio - start // ratio for start, length in zip(self.starts, self.lengths, strict=True))


def decode(batch: int, ratio: int, boundary: bool) -> Case:
    """One token per request; lengths over all residues of ``ratio``, or every request at the end of a block."""
    step = 1 if batch >= ratio else ratio // batch
    starts = tuple(1024 + (ratio - 1 if boundary else (i * step) % ratio) + ratio * (i % 7) for i in range(batch))
    return Case(f"decode-b{batch}-{'boundary' if boundary else 'mixed'}", starts, (1,) * batch)


def long_decode(batch: int, thousands: int) -> Case:
    """One token per request, of sequences of about this many thousand tokens."""
    return Case(f"decode-b{batch}-{thousands}k", tuple(1024 * thousands - 1 - 37 * i for i in range(batch)), (1,) * batch)


def prefill(tokens: int, requests: int = 1, start: int = 0) -> Case:
    """``tokens`` new tokens shared out evenly."""
    each = tokens // requests
    tail = f"-from{start}" if start else ""
    return Case(f"prefill-{requests}x{each}{tail}", (start,) * requests, (each,) * requests)


def flush_cases(ratio: int, quick: bool) -> list[Case]:
    """Decode, verify, prefill from 0 and after a prefix, and both together, in a layer with blocks of ``ratio`` tokens."""
    mixed, at_boundary = ((1, 32, 256), (1, 256)) if quick else ((1, 8, 32, 64, 128, 256), (1, 32, 128, 256))
    lengths = (1024, 8192, 32768) if quick else (256, 1024, 4096, 8192, 16384, 32768)
    chats = tuple(1024 + i for i in range(64))
    return [
        *(decode(batch, ratio, False) for batch in mixed),
        *(decode(batch, ratio, True) for batch in at_boundary),
        Case("verify-b64-4", chats, (4,) * 64),
        *map(prefill, lengths),
        prefill(8192, 16),
        prefill(8192, 1, 1027),
        prefill(8191, 1, 2048),
        Case("mixed-64+4096", (*chats, 2048), (1,) * 64 + (4096,)),
    ]


def window_cases(quick: bool) -> list[Case]:
    """Decode and prefill."""
    return [*(decode(batch, 4, False) for batch in (1, 256)), *map(prefill, (8192,) if quick else (1024, 8192, 32768))]


def plan_cases(quick: bool) -> list[Case]:
    """Decode of short and long sequences, and prefill."""
    sizes = [(1, 8), (256, 8)] if quick else [(1, 8), (1, 1024), (32, 32), (128, 8), (256, 8), (64, 128)]
    return [*(long_decode(*size) for size in sizes), prefill(8192), prefill(8192, 16), prefill(32768)]


def index_cases(quick: bool) -> list[Case]:
    """Decode from 2k to 1M tokens, verify, prefill from 0, after a prefix, and of many requests; lengths that differ."""
    sizes = [(1, 2), (1, 8), (1, 32), (1, 128), (1, 1024), (8, 32), (8, 128), (32, 32), (64, 32), (128, 8), (256, 8)]
    if quick:
        sizes = [(1, 8), (1, 1024), (32, 32), (256, 8)]
    more = [] if quick else [prefill(32768), prefill(8192, 1, 24576), prefill(4096, 1, 122880)]
    return [
        *(long_decode(*size) for size in sizes),
        Case("decode-b64-one-512k", (512 * 1024 - 1, *(2048 + 97 * i for i in range(63))), (1,) * 64),
        Case("verify-b64-4-32k", tuple(32_000 - 11 * i for i in range(64)), (4,) * 64),
        prefill(8192),
        prefill(8192, 16, 8192),
        *more,
    ]


def make_step(case: Case, device: torch.device) -> StepTensors:
    """The step's tensors: every request has its own pages, in random order."""
    pages, count = -(-max(case.lengths) // PAGE_TOKENS), len(case.starts)
    table = torch.randperm(count * pages, device=device).view(count, pages)
    starts, extends = torch.tensor(case.starts, device=device), torch.tensor(case.extends, device=device)
    rows = torch.repeat_interleave(torch.arange(count, device=device), extends)
    first = torch.cumsum(extends, 0) - extends
    return StepTensors(
        positions=torch.arange(case.num_tokens, device=device) - first[rows] + starts[rows],
        token_rows=rows,
        seq_lens=starts + extends,
        extend_lens=extends,
        state_slots=torch.randperm(count, device=device),
        history_pages=table,
        window_pages=table.clone(),
        page_tokens=PAGE_TOKENS,
        num_window_rows=count * pages * PAGE_TOKENS,
    )


def rope(case: Case, device: torch.device) -> torch.Tensor:
    """The table of a compressing layer, fp32, with a row for each position of the case and one more."""
    return rope_table(RopeSpec(160000.0, ROPE_DIM, 16.0, 65536), max(case.lengths) + 1, device)


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal values."""
    return torch.randn(shape, device=device).to(dtype)


def zero_pool(fmt: RowFormat, num_rows: int, device: torch.device) -> torch.Tensor:
    """A pool that holds no rows yet."""
    return torch.zeros(fmt.pool_shape(num_rows), dtype=fmt.storage_dtype, device=device)
