"""``python -m sglang_dsv4 size``."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.sizing import GIB, RELEASED, ServerSize, bytes_by_pool, most_tokens, released_spec
from sglang_dsv4.spec import CacheSpec

_INDEX_FORMAT_OF_ROWS = {"bf16": "bf16", "fp8_584": "fp8", "fp32": "fp32"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``size``."""
    parser = subparsers.add_parser("size", help="how many tokens fit into how much memory")
    parser.add_argument("model", help="flash, pro, or a folder with a config.json")
    parser.add_argument(
        "--memory", type=float, required=True, metavar="GIB", help="for the cache, on each GPU"
    )
    parser.add_argument(
        "--requests", type=int, default=64, help="requests that run at once (default: 64)"
    )
    parser.add_argument(
        "--swa-full-tokens-ratio",
        type=float,
        default=0.1,
        help="window pages for each history page (default: 0.1, as SGLang's)",
    )
    parser.add_argument(
        "--dsv4-kv-format", choices=sorted(_INDEX_FORMAT_OF_ROWS), default="bf16", help="rows"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the size of every pool."""
    spec = _spec_of(args.model, args.dsv4_kv_format)
    share = args.swa_full_tokens_ratio
    tokens = most_tokens(spec, int(args.memory * GIB), args.requests, share)
    if not tokens:
        raise UnsupportedError(
            f"--memory {args.memory}: expected room for {args.requests} requests and a page of 256 tokens, got too little"
        )
    capacity = ServerSize(tokens, args.requests, share).capacity(spec.page_tokens)
    sizes = bytes_by_pool(spec, capacity)
    table = Table("pool", "bytes", title=f"--max-total-tokens {tokens}", title_justify="left")
    for name, size in [*sizes.items(), ("in all", sum(sizes.values()))]:
        table.add_row(name.replace("_", " "), f"{size:,}")
    Console().print(table)
    return 0


def _spec_of(model: str, row_format: str) -> CacheSpec:
    formats = {"row_format": row_format, "index_format": _INDEX_FORMAT_OF_ROWS[row_format]}
    if model in RELEASED:
        return released_spec(model, **formats)
    path = Path(model) / "config.json"
    if not path.is_file():
        raise UnsupportedError(
            f"model {model}: expected flash, pro, or a folder with a config.json, found none"
        )
    return CacheSpec.from_hf(json.loads(path.read_text(encoding="utf-8")), **formats)
