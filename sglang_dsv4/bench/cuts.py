"""``bench cuts``: what a fork, a roll-back and a snapshot cost, by the length of the sequence. No model takes part."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sglang_dsv4.bench.timing import need_cuda
from sglang_dsv4.cache import CompressedKVCache, CompressorWeights, NormWeights, Request
from sglang_dsv4.cache.regions import Part
from sglang_dsv4.check.attention_work import v4_config
from sglang_dsv4.errors import CacheInvariantError
from sglang_dsv4.spec import INDEX_FORMAT_OF_ROWS, CacheSpec

LENGTHS = (1_000, 10_000, 100_000)
DRAFT = 4
# DeepSeek-V4 Flash: 2 window-only, 21 CSA and 20 HCA layers.
FLASH_RATIOS = (0, 0, *((4, 128) * 20), 4)
ONE_OF_EACH = (0, 4, 128)
ACTIONS = ("fork", "truncate", "snapshot", "restore")
_REPEATS = 30
_CHUNK = 512


def make_spec(ratios: Sequence[int], row_format: str) -> CacheSpec:
    """DeepSeek-V4's geometry with these layers."""
    index_format = INDEX_FORMAT_OF_ROWS[row_format]
    return CacheSpec.from_hf(v4_config(ratios), row_format=row_format, index_format=index_format, max_draft_tokens=DRAFT)


def make_cache(spec: CacheSpec, length: int, requests: int, device: str) -> CompressedKVCache:
    """Room for a sequence of this length and for what others write of their own; every weight is 1, every bias 0."""
    pages = -(-length // spec.page_tokens) + 2 * requests
    cache = CompressedKVCache(spec, num_pages=pages, num_window_pages=4 * requests, max_requests=requests, device=device)
    for layer in cache.layers:
        layer.bind(window=NormWeights(torch.ones(512, device=cache.device), 1e-6))
        for part in layer.parts[1:]:
            bias = torch.zeros(_streams(layer) * layer.ratio, _dim(spec, part), device=cache.device)
            layer.bind(**{part.value: CompressorWeights(bias, torch.ones_like(bias[0]), 1e-6)})
    return cache


def _streams(layer: Any) -> int:
    return 2 if Part.INDEX in layer.parts else 1


def _dim(spec: CacheSpec, part: Part) -> int:
    return spec.index_dim if part is Part.INDEX else spec.head_dim


def feed(cache: CompressedKVCache, request: Request, tokens: range, salt: int = 0) -> None:
    """Append tokens whose inputs are random, and given by position and salt."""
    for begin in range(tokens.start, tokens.stop, _CHUNK):
        count = min(_CHUNK, tokens.stop - begin)
        plan = cache.plan([(request, count)])
        for layer in cache.layers:
            generator = torch.Generator().manual_seed(1_000_003 * salt + 97 * begin + layer.layer_id)
            widths = {p.value: 2 * _streams(layer) * _dim(cache.spec, p) for p in layer.parts[1:]} | {"window": 512}
            layer.append(plan, **{n: torch.randn(count, w, generator=generator).to(cache.device) for n, w in widths.items()})
        cache.commit(plan)


def check(row_format: str, device: str, length: int = 1_001) -> None:
    """A fork, its origin, a roll-back and a restored snapshot go on to the bytes of a sequence that was never cut.

    Raises:
        CacheInvariantError: names what differs.
    """
    cache = make_cache(make_spec(ONE_OF_EACH, row_format), 6 * length, 6, device)
    with tempfile.TemporaryDirectory() as folder:

        def saved(request: Request) -> list[object]:
            path = Path(folder) / f"{request.req_id}"
            cache.save(request, path)
            body = json.loads(path.read_text())
            return [body["history"], body["window"], body["state"]]

        trunk = cache.open()
        feed(cache, trunk, range(length))
        kept = cache.snapshot(trunk)
        branches = {"fork": cache.fork(trunk), "origin": trunk, "restore": cache.restore(kept), "truncate": cache.fork(trunk)}
        feed(cache, branches["truncate"], range(length, length + DRAFT), salt=9)
        cache.truncate(branches["truncate"], length)
        for salt, (name, request) in enumerate(branches.items()):
            cold = cache.open()
            feed(cache, cold, range(length))
            for sequence in (request, cold):
                feed(cache, sequence, range(length, length + 300), salt)
            if saved(request) != saved(cold):
                raise CacheInvariantError(f"{name}: expected the bytes of a cold run, got others")
            cache.close(cold)


def measure(row_format: str, device: str, lengths: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    """Times in microseconds, medians, in a cache with the layers of Flash; and bytes copied."""
    spec = make_spec(FLASH_RATIOS, row_format)
    return [_measure(make_cache(spec, length, 3, device), length) for length in lengths]


def _measure(cache: CompressedKVCache, length: int) -> dict[str, Any]:
    trunk = cache.requests.adopt(length, length - DRAFT)  # times do not depend on the values
    kept = cache.snapshot(trunk)

    def nothing() -> None:
        return None

    def fork() -> Request:
        return cache.fork(trunk)

    # What is made first, what is timed, and what of them is closed.
    actions: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "fork": (nothing, lambda _: fork()),
        "truncate": (fork, lambda twin: cache.truncate(twin, length - DRAFT)),
        "snapshot": (nothing, lambda _: cache.snapshot(trunk)),
        "restore": (nothing, lambda _: cache.restore(kept)),
    }
    row: dict[str, Any] = {"tokens": length, "pages": len(trunk.pages.history)}
    row |= {f"{name}_us": _time(cache, *action) for name, action in actions.items()}
    before = cache.report()
    feed(cache, fork(), range(length, length + 1))
    after = cache.report()
    for name, source in (("fork_bytes", "fork"), ("first_write_bytes", "copy_on_write")):
        row[name] = after.bytes_copied[source] - before.bytes_copied[source]
    row["state_bytes"] = after.stream_bytes_per_request
    row["page_bytes"] = after.history_page_bytes + after.window_page_bytes
    return row


def _time(cache: CompressedKVCache, prepare: Callable[[], Any], action: Callable[[Any], Any]) -> float:
    """Median time of an action; what was prepared, or else what it returned, is closed after each run."""
    samples = []
    for _ in range(_REPEATS):
        prepared = prepare()
        _synchronize(cache)
        started = time.perf_counter()
        result = action(prepared)
        _synchronize(cache)
        samples.append(1e6 * (time.perf_counter() - started))
        cache.close(result if prepared is None else prepared)
    return float(np.median(samples))


def _synchronize(cache: CompressedKVCache) -> None:
    if cache.device.type == "cuda":
        torch.cuda.synchronize()


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``bench cuts``."""
    parser = subparsers.add_parser(
        "cuts",
        help="fork, truncate, snapshot and restore by sequence length, checked first",
        description="Time what a fork, a truncation, a snapshot and a restored snapshot cost in a cache with the layers of "
        "V4-Flash, and count the bytes that they copy. First each of them is continued, and compared with a sequence that was "
        "never cut. No model takes part.",
    )
    rows = {"choices": sorted(INDEX_FORMAT_OF_ROWS), "default": "bf16", "help": "row format (default: %(default)s)"}
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--rows", **rows)
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
    title = f"layers of Flash, {args.rows} rows, {args.device}"
    table = Table("tokens", "pages", *(f"{name}, us" for name in ACTIONS), "bytes: fork", "first write", "a page", title=title)
    for row in rows:
        times = (f"{row[f'{name}_us']:.0f}" for name in ACTIONS)
        sizes = (f"{row[name]:,}" for name in ("fork_bytes", "first_write_bytes", "page_bytes"))
        table.add_row(f"{row['tokens']:,}", str(row["pages"]), *times, *sizes)
    Console(width=130).print(table)
    return 0
