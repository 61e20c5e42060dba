"""What a user chose on the command line, carried to the scheduler process by environment variables.

Imports nothing heavy at the top, since it is loaded with the flag off, too.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError

ENABLE_FLAG = "--enable-dsv4-compressed-kv"
CHECK_LEVELS = ("off", "boundary", "step")


@dataclass(frozen=True)
class Options:
    """Formats of the cache, the attention that was asked for (None takes the fastest that is possible), and how much is
    checked while serving, with the folder for what a failed check leaves behind."""

    row_format: str = "bf16"
    index_format: str = "bf16"
    attention: str | None = None
    check: str = "off"
    dumps: str = "."

    def formats(self) -> dict[str, str]:
        """Those of them that are fields of `CacheSpec`."""
        return {"row_format": self.row_format, "index_format": self.index_format}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add our flags to SGLang's parser. Values are checked by `read`, so that this needs nothing that may be missing."""
    group = parser.add_argument_group("sglang-dsv4")
    group.add_argument(ENABLE_FLAG, action="store_true", help="Serve DeepSeek-V4 with CompressedKVCache of sglang-dsv4.")
    group.add_argument(
        "--dsv4-kv-format",
        metavar="FORMAT",
        default=None,
        help="Row format of window rows and entries: bf16 (default), fp8_584, or fp32 (exact, for debugging).",
    )
    group.add_argument(
        "--dsv4-index-format",
        metavar="FORMAT",
        default=None,
        help="Format of index keys: bf16, fp8 or fp32 (default: the one of the rows; fp8 with fp8_584 rows).",
    )
    group.add_argument(
        "--dsv4-attention",
        metavar="NAME",
        default=None,
        help="Attention: eager, flashinfer or flashmla (default: the fastest that is possible on the device).",
    )
    group.add_argument(
        "--dsv4-check",
        metavar="LEVEL",
        default=None,
        help="Checksums of stored rows: off (default), boundary (compared at prefix hits and whole pages) or step (before "
        "every step). A failed check stops the server and leaves a dump for `python -m sglang_dsv4 inspect`. On a GPU it needs "
        "--disable-cuda-graph.",
    )
    group.add_argument("--dsv4-check-dumps", metavar="DIR", default=None, help="Folder for dumps (default: the current one).")


def publish(args: argparse.Namespace) -> None:
    """Hand parsed flags to this process and to those it starts.

    Raises:
        UnsupportedError: a format or an attention was chosen without the flag that enables the cache.
    """
    # A program may call SGLang's ``from_cli_args`` with a namespace that no parser of SGLang's has made.
    chosen = {
        env.KV_FORMAT: getattr(args, "dsv4_kv_format", None),
        env.INDEX_FORMAT: getattr(args, "dsv4_index_format", None),
        env.ATTENTION: getattr(args, "dsv4_attention", None),
        env.CHECK: getattr(args, "dsv4_check", None),
        env.CHECK_DUMPS: getattr(args, "dsv4_check_dumps", None),
    }
    if getattr(args, "enable_dsv4_compressed_kv", False):
        env.set_value(env.COMPRESSED_KV, "1")
    elif any(chosen.values()) and not is_enabled():
        raise UnsupportedError(
            "--dsv4-kv-format, --dsv4-index-format, --dsv4-attention, --dsv4-check, --dsv4-check-dumps: expected together "
            f"with {ENABLE_FLAG}"
        )
    for name, value in chosen.items():
        if value is not None:
            env.set_value(name, value)


def is_enabled() -> bool:
    """Whether the compressed cache was asked for, by flag or by ``SGLANG_DSV4_COMPRESSED_KV=1``."""
    return env.is_enabled(env.COMPRESSED_KV)


def is_asked_for(argv: Iterable[str]) -> bool:
    """`is_enabled`, or the flag is among arguments that have not been parsed yet."""
    return is_enabled() or any(part.startswith(ENABLE_FLAG) for part in argv)


def check_server(kind: str) -> None:
    """Refuse every server of ``sglang serve`` but the one of language models.

    Args:
        kind (str): as ``--model-type`` names it.

    Raises:
        SystemExit: names it.
    """
    if kind not in ("auto", "llm"):
        raise SystemExit(f"sglang_dsv4: --model-type {kind}: not supported with {ENABLE_FLAG}")


def read() -> Options:
    """The options in force.

    Raises:
        UnsupportedError: a variable names a format, or a level of checks, that does not exist.
    """
    from dsv4_kernels.layout import INDEX_FORMATS, ROW_FORMATS
    from sglang_dsv4.spec import INDEX_FORMAT_OF_ROWS

    row_format = env.get(env.KV_FORMAT) or "bf16"
    if row_format not in ROW_FORMATS:
        raise UnsupportedError(f"--dsv4-kv-format ({env.KV_FORMAT}): expected one of {sorted(ROW_FORMATS)}, got {row_format!r}")
    index_format = env.get(env.INDEX_FORMAT) or INDEX_FORMAT_OF_ROWS[row_format]
    if index_format not in INDEX_FORMATS:
        raise UnsupportedError(
            f"--dsv4-index-format ({env.INDEX_FORMAT}): expected one of {sorted(INDEX_FORMATS)}, got {index_format!r}"
        )
    check = env.get(env.CHECK) or CHECK_LEVELS[0]
    if check not in CHECK_LEVELS:
        raise UnsupportedError(f"--dsv4-check ({env.CHECK}): expected one of {list(CHECK_LEVELS)}, got {check!r}")
    dumps = env.get(env.CHECK_DUMPS) or "."
    return Options(row_format, index_format, env.get(env.ATTENTION), check, dumps)
