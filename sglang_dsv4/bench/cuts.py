"""``bench cuts``: what a fork, a roll-back and a snapshot cost, by the length of the sequence. No model takes part."""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sglang_dsv4.bench.machine import need_cuda
from sglang_dsv4.cache import CompressedKVCache, CompressorWeights, NormWeights, Request
from sglang_dsv4.cache.regions import Part
from sglang_dsv4.errors import CacheInvariantError
from sglang_dsv4.spec import INDEX_FORMAT_OF_ROWS, CacheSpec

LENGTHS = (1_000, 10_000, 100_000)
DRAFT = 4
# DeepSeek-V4 Flash: 2 window-only, 21 CSA and 20 HCA layers.
FLASH_RATIOS = (0, 0, *((4, 128) * 20), 4)
ONE_OF_EACH = (0, 4, 128)
_REPEATS = 30
_CHUNK = 512


def make_spec(ratios: Sequence[int], row_format: str) -> CacheSpec:
    """DeepSeek-V4's geometry with these layers."""
    config = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": len(ratios),
        "compress_ratios": list(ratios),
        "index_topk": 512,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "index_head_dim": 128,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
    }
    return CacheSpec.from_hf(
        config, row_format=row_format, index_format=INDEX_FORMAT_OF_ROWS[row_format], max_draft_tokens=DRAFT
    )


def make_cache(spec: CacheSpec, length: int, requests: int, device: str) -> CompressedKVCache:
    """Room for a sequence of this length and for what others write of their own."""
    pages = -(-length // spec.page_tokens) + 2 * requests
    return CompressedKVCache(spec, num_pages=pages, num_window_pages=4 * requests, max_requests=requests, device=device)


def feed(cache: CompressedKVCache, request: Request, tokens: range, salt: int = 0) -> None:
    """Append tokens whose inputs are random, and given by position and salt."""
    for begin in range(tokens.start, tokens.stop, _CHUNK):
        count = min(_CHUNK, tokens.stop - begin)
        plan = cache.plan([(request, count)])
        for layer in cache.layers:
            generator = torch.Generator().manual_seed(1_000_003 * salt + 97 * begin + layer.layer_id)

            def given(rows: int, width: int, g: torch.Generator = generator) -> torch.Tensor:
                return torch.randn(rows, width, generator=g).to(cache.device)

            inputs = {"window": given(count, 512)}
            layer.bind(window=NormWeights(torch.ones(512, device=cache.device), 1e-6))
            for part in layer.parts[1:]:
                dim = cache.spec.index_dim if part is Part.INDEX else cache.spec.head_dim
                overlap = 2 if len(layer.parts) == 3 else 1
                bias = torch.zeros(overlap * layer.ratio, dim, device=cache.device)
                layer.bind(**{part.value: CompressorWeights(bias, torch.ones(dim, device=cache.device), 1e-6)})
                inputs[part.value] = given(count, 2 * overlap * dim)
            layer.append(plan, **inputs)
        cache.commit(plan)


def check(row_format: str, device: str, length: int = 1_001) -> None:
    """A fork, its origin, a roll-back and a restored snapshot go on to the bytes of a sequence that was never cut.

    Raises:
        CacheInvariantError: names what differs.
    """
    spec = make_spec(ONE_OF_EACH, row_format)
    cache = make_cache(spec, 6 * length, 6, device)
    with tempfile.TemporaryDirectory() as folder:

        def saved(request: Request) -> list[object]:
            path = Path(folder) / f"{request.req_id}"
            cache.save(request, path)
            body = json.loads(path.read_text())
            return [body["history"], body["window"], body["state"]]

        trunk = cache.open()
        feed(cache, trunk, range(length))
        kept = cache.snapshot(trunk)
        branches = {"fork": cache.fork(trunk), "origin": trunk, "restore": cache.restore(kept)}
        branches["truncate"] = cache.fork(trunk)
        feed(cache, branches["truncate"], range(length, length + DRAFT), salt=9)
        cache.truncate(branches["truncate"], length)
        for salt, (name, request) in enumerate(branches.items()):
            feed(cache, request, range(length, length + 300), salt)
            cold = cache.open()
            feed(cache, cold, range(length))
            feed(cache, cold, range(length, length + 300), salt)
            if saved(request) != saved(cold):
                raise CacheInvariantError(f"{name}: expected the bytes of a cold run, got others")
            cache.close(cold)


def measure(row_format: str, device: str, lengths: Sequence[int] = LENGTHS) -> list[dict]:
    """Times in microseconds, medians, in a cache with the layers of Flash; and bytes copied."""
    spec = make_spec(FLASH_RATIOS, row_format)
    return [_measure(make_cache(spec, length, 3, device), length) for length in lengths]


def _measure(cache: CompressedKVCache, length: int) -> dict:
    trunk = cache.requests.adopt(length, length - DRAFT)  # times do not depend on the values
    kept = cache.snapshot(trunk)
    row: dict = {"tokens": length, "pages": len(trunk.pages.history)}
    row["fork_us"] = _time(cache, lambda _: cache.fork(trunk), cache.close)
    row["truncate_us"] = _time(cache, lambda twin: cache.truncate(twin, length - DRAFT), cache.close, lambda: cache.fork(trunk))
    row["snapshot_us"] = _time(cache, lambda _: cache.snapshot(trunk), cache.close)
    row["restore_us"] = _time(cache, lambda _: cache.restore(kept), cache.close)
    before = cache.report()
    twin = cache.fork(trunk)
    feed(cache, twin, range(length, length + 1))
    after = cache.report()
    for name, source in (("fork_bytes", "fork"), ("first_write_bytes", "copy_on_write")):
        row[name] = after.bytes_copied[source] - before.bytes_copied[source]
    row["state_bytes"] = after.stream_bytes_per_request
    row["page_bytes"] = after.history_page_bytes + after.window_page_bytes
    return row


def _time(
    cache: CompressedKVCache,
    action: Callable[[Any], Any],
    undo: Callable[[Any], None],
    prepare: Callable[[], Any] = lambda: None,
) -> float:
    """Median time of an action; what was prepared, or else what it returned, is undone after each run."""
    samples = []
    for _ in range(_REPEATS):
        prepared = prepare()
        _synchronize(cache)
        started = time.perf_counter()
        result = action(prepared)
        _synchronize(cache)
        samples.append(1e6 * (time.perf_counter() - started))
        undo(result if prepared is None else prepared)
    return statistics.median(samples)


def _synchronize(cache: CompressedKVCache) -> None:
    if cache.device.type == "cuda":
        torch.cuda.synchronize()


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``bench cuts``."""
    parser = subparsers.add_parser(
        "cuts",
        help="fork, truncate, snapshot and restore by sequence length, checked first",
        description="Time what a fork, a truncation, a snapshot and a restored snapshot cost in a cache with the layers of "
        "V4-Flash, and count the bytes that they copy. First each of them is continued, and compared with a sequence that was "
        "never cut. No model takes part.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--rows", choices=sorted(INDEX_FORMAT_OF_ROWS), default="bf16", help="row format (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Check, measure, and print a table; the exit status."""
    if args.device == "cuda":
        need_cuda("cuts")
    check(args.rows, args.device)
    rows = measure(args.rows, args.device)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    names = ("fork_us", "truncate_us", "snapshot_us", "restore_us")
    table = Table(
        "tokens",
        "pages",
        *(name.replace("_us", ", us") for name in names),
        "bytes: fork",
        "first write",
        "a page",
        title=f"layers of Flash, {args.rows} rows, {args.device}",
    )
    for row in rows:
        sizes = (row["fork_bytes"], row["first_write_bytes"], row["page_bytes"])
        table.add_row(
            f"{row['tokens']:,}", str(row["pages"]), *(f"{row[name]:.0f}" for name in names), *(f"{size:,}" for size in sizes)
        )
    Console(width=130).print(table)
    return 0
