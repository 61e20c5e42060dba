"""``bench host``: what a step costs the host before the GPU can start, by SGLang's calls of our pool and backend.

Steps run without a graph. Projections are there already, so that no time is SGLang's. On a machine without a GPU everything
happens but the launches themselves, and there is no attention: the one for CPUs computes.
"""

import argparse
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sglang_dsv4.attention import EagerAttention, make_attention
from sglang_dsv4.bench.cuts import make_spec
from sglang_dsv4.check.bare_pool import bare_pool, model_config
from sglang_dsv4.spec import CacheSpec

RATIOS = (0, 4, 128, 4, 128)
PARTS = ("plan", "window", "main", "index", "select", "attend")
_HEADS, _INDEX_HEADS, _PAGES = 64, 64, 40
_PREFIX = 4096
STEPS = {"decode of 1": (1, 1, True), "decode of 32": (32, 1, True), "extend by 600": (1, 600, False)}


class Unattended(EagerAttention):
    """No query attends: only calls are timed."""

    def run(self, layer: Any, q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return q


@contextlib.contextmanager
def unlaunched() -> Iterator[None]:
    """On a CPU: Triton's launchers get their arguments, and launch nothing."""
    from triton.runtime.jit import JITFunction

    from dsv4_kernels.step_plan import fused
    from sglang_dsv4.cache import external, triton_kernels
    from sglang_dsv4.plugin.serve import step_planner

    def kernels(_: str, *given: Any) -> triton_kernels.TritonKernels:
        return triton_kernels.TritonKernels(*given)

    with (
        mock.patch.object(JITFunction, "run", lambda self, *args, grid, warmup, **kw: None),
        mock.patch.object(external, "make_kernels", kernels),
        mock.patch.object(step_planner, "naive_step_plan", fused.step_plan),
    ):
        yield


class ServedModel:
    """Calls pool and backend as SGLang's model does, layer by layer, and times every call on the host."""

    def __init__(self, spec: CacheSpec, device: str, max_tokens: int = 1024, max_requests: int = 64) -> None:
        from sglang_dsv4.plugin.serve.backend import CompressedKVBackend

        self.spec, self.device = spec, device
        self.pool = bare_pool(spec, model_config(_PAGES * spec.page_tokens, _INDEX_HEADS), _PAGES, max_requests, device)
        rows = torch.zeros(max_requests + 1, _PAGES * spec.page_tokens, dtype=torch.int32, device=device)
        rows[1:] = spec.page_tokens + torch.arange(rows.shape[1], dtype=torch.int32, device=device)

        def make(fixed: Any = None, like: Any = None) -> Any:
            if device == "cpu":
                return Unattended(self.pool.cache)
            return make_attention(None, self.pool.cache, _HEADS, fixed=fixed, like=like)[0]

        self.backend = CompressedKVBackend(self.pool, rows, make(), make=make)
        random = partial(torch.randn, device=device)
        self.q = random(max_tokens, _HEADS, spec.head_dim).bfloat16()
        self.kv, self.weight, self.sink = random(max_tokens, 512).bfloat16(), torch.ones(512, device=device), random(_HEADS)
        index_q, index_weights = random(max_tokens, _INDEX_HEADS * 128).bfloat16(), random(max_tokens, _INDEX_HEADS).bfloat16()
        self.indexers = []
        for layer in spec.layers:
            main, index = (self._compressor(layer, dim, random(max_tokens, 4 * dim)) for dim in (512, 128))
            indexer = SimpleNamespace(
                layer_id=layer.layer_id,
                n_heads=_INDEX_HEADS,
                head_dim=128,
                wq_b=lambda given: (index_q[: len(given)], None),
                compute_weights=lambda x, skip_scale: index_weights[: len(x)],
                compressor=index,
            )
            self.indexers.append((layer, main, indexer))

    def _compressor(self, layer: Any, dim: int, scores: torch.Tensor) -> Any:
        slots, width = layer.ratio * (1 + layer.overlap), dim * (4 if layer.overlap else 2)
        return SimpleNamespace(
            compute_kv_score=lambda x, batch: scores[: len(x), :width],
            ape=torch.zeros(slots, dim, device=self.device),
            head_dim=dim,
            norm=SimpleNamespace(weight=torch.ones(dim, device=self.device), variance_epsilon=1e-6),
        )

    def batch(self, requests: int, new: int, decode: bool) -> Any:
        """SGLang's ForwardBatch of requests that have a prefix of 4,096 tokens."""
        mode = SimpleNamespace(name="DECODE" if decode else "EXTEND", is_decode=lambda: decode, is_idle=lambda: False)
        ends = torch.full((requests,), _PREFIX + new)
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=requests,
            seq_lens=ends.to(self.device),
            seq_lens_cpu=ends,
            extend_seq_lens=torch.full((requests,), new, dtype=torch.int32, device=self.device),
            extend_seq_lens_cpu=[new] * requests,
            positions=torch.arange(_PREFIX, _PREFIX + new, device=self.device).repeat(requests),
            req_pool_indices=torch.arange(1, requests + 1, device=self.device),
            rids=[],
        )

    def layers(self, batch: Any, timed: Callable[..., Any]) -> None:
        """Every layer's calls in SGLang's order, through ``timed(part, function, *arguments)``."""
        backend, count = self.backend, len(batch.positions)
        x, kv, q = self.q[:count], self.kv[:count], self.q[:count]
        for layer, main, indexer in self.indexers:
            number = layer.layer_id
            store = self.pool.set_swa_key_buffer_radix_fused_norm_rope
            timed("window", store, number, None, kv, self.weight, 1e-6, None, None)
            if layer.indexed:
                timed("index", backend.forward_indexer_compressor, x, batch, number, indexer.compressor)
                timed("select", partial(backend.forward_c4_indexer, skip_compressor=True), x, x, indexer, batch)
            if layer.ratio:
                timed("main", backend.forward_core_compressor, x, batch, number, main)
            timed("attend", partial(backend.forward, attn_sink=self.sink, save_kv_cache=False), q, q, q, layer, batch)

    def step(self, batch: Any) -> Counter[str]:
        """One step; nanoseconds of the host, by part."""
        spent: Counter[str] = Counter()

        def timed(part: str, call: Callable[..., Any], *given: Any) -> None:
            begin = time.perf_counter_ns()
            call(*given)
            spent[part] += time.perf_counter_ns() - begin

        timed("plan", self.backend.init_forward_metadata, batch)
        self.layers(batch, timed)
        return spent


def measure(model: ServedModel, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds of the host for a step of each kind, by part and in all: medians over ``repeats``."""
    found = {}
    for name, given in STEPS.items():
        batch, spent = model.batch(*given), []
        for _ in range(repeats + 5):
            spent.append(model.step(batch))
            if model.device != "cpu":
                torch.cuda.synchronize()
        kept = spent[5:]
        found[name] = {part: float(np.median([one[part] for one in kept])) / 1e3 for part in PARTS}
        found[name]["sum"] = float(np.median([sum(one.values()) for one in kept])) / 1e3
    return found


def add_parser(what: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``bench host``."""
    parser = what.add_parser(
        "host",
        help="host time of a decode step and of a short extend, without graphs; needs SGLang",
        description="Time on the host what our pool and backend do in a step of five layers (one window-only, two CSA, two HCA), "
        "by SGLang's calls. On a machine without a GPU kernels are not launched, and attention is left out.",
    )
    parser.add_argument("--rows", default="fp8_584", choices=("bf16", "fp8_584"), help="row format")
    parser.add_argument("--repeats", type=int, default=200, help="steps of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.nullcontext() if device == "cuda" else unlaunched():
        found = measure(ServedModel(make_spec(RATIOS, args.rows), device), args.repeats)
    table = Table("us, host", *PARTS, "sum", title=f"{len(RATIOS)} layers, {args.rows} rows, {device}", title_justify="left")
    for name, parts in found.items():
        table.add_row(name, *(f"{parts[part]:.0f}" for part in (*PARTS, "sum")))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"device": device, "rows": args.rows, "ratios": RATIOS, "us": found}, indent=1))
    return 0
