"""``python -m sglang_dsv4 size``."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_dsv4.cache.sizing import GIB, RELEASED, ServerSize, bytes_by_pool, most_tokens, released_spec
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.spec import INDEX_FORMAT_OF_ROWS, CacheSpec


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``size``."""
    parser = subparsers.add_parser(
        "size",
        help="how many tokens fit into how much memory",
        description="Print the largest --max-total-tokens whose cache fits into the memory given, and the bytes of every "
        "pool. Nothing is allocated, and no checkpoint is loaded.",
    )
    parser.add_argument("model", help="flash, pro, or a folder with a config.json")
    parser.add_argument(
        "--memory",
        type=float,
        required=True,
        metavar="GIB",
        help="for the cache, on each GPU: what weights, activations and graphs leave",
    )
    parser.add_argument(
        "--requests", type=int, default=64, metavar="N", help="requests that run at once (default: %(default)s)"
    )
    parser.add_argument(
        "--swa-full-tokens-ratio",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="window pages for each history page (default: %(default)s, as SGLang's)",
    )
    parser.add_argument(
        "--dsv4-kv-format", choices=sorted(INDEX_FORMAT_OF_ROWS), default="bf16", help="row format (default: %(default)s)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the size of every pool.

    Raises:
        UnsupportedError: an option is out of range, the model cannot be sized, or nothing fits.
    """
    _check_ranges(args)
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


def _check_ranges(args: argparse.Namespace) -> None:
    if not 0 < args.memory < math.inf:
        raise UnsupportedError(f"--memory: expected a number of GiB above 0, got {args.memory}")
    if args.requests < 1:
        raise UnsupportedError(f"--requests: expected 1 or more, got {args.requests}")
    share = args.swa_full_tokens_ratio
    if not 0 < share <= 1:
        raise UnsupportedError(f"--swa-full-tokens-ratio: expected more than 0 and at most 1, got {share}")


def _spec_of(model: str, row_format: str) -> CacheSpec:
    formats: dict[str, Any] = {"row_format": row_format, "index_format": INDEX_FORMAT_OF_ROWS[row_format]}
    if model in RELEASED:
        return released_spec(model, **formats)
    path = Path(model) / "config.json"
    if not path.is_file():
        raise UnsupportedError(f"model {model}: expected flash, pro, or a folder with a config.json, found none")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedError(f"{path}: expected JSON, got {error}") from error
    return CacheSpec.from_hf(config, **formats)
