"""``python -m sglang_dsv4 COMMAND``."""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

from sglang_dsv4 import __version__
from sglang_dsv4.errors import CacheError

# Command modules, each with ``add_parser``; imported only when its command runs, so that one missing package does not
# take the others down.
COMMANDS = {
    "doctor": ("sglang_dsv4.plugin.observe.doctor", "print versions, capabilities, SGLang's contract, and what would run"),
    "make-tiny": ("sglang_dsv4.tiny.command", "write a tiny random DeepSeek-V4 checkpoint"),
    "demo": ("sglang_dsv4.check.demo.command", "serve a tiny checkpoint with SGLang and check every answer"),
    "stress": ("sglang_dsv4.check.stress.command", "send a server many requests at once and check every answer"),
    "size": ("sglang_dsv4.cache.sizing_command", "how many tokens fit into how much memory"),
    "inspect": ("sglang_dsv4.cache.inspect.command", "show what a failed integrity check left behind"),
    "prune": ("sglang_dsv4.cache.persist.prune_command", "remove pages of saved sequences that no manifest names any more"),
    "compare": ("sglang_dsv4.check.compare.command", "serve with our cache and with SGLang's own, and compare every token"),
    "bench": (
        "sglang_dsv4.bench.command",
        "time the kernels on a GPU, cuts of a sequence, or whole servers, each checked before it is timed",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m sglang_dsv4", description="The KV cache of DeepSeek-V4.")
    parser.add_argument("--version", action="version", version=f"sglang-dsv4 {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for name, (module, summary) in COMMANDS.items():
        if name == chosen:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    args = parser.parse_args(arguments)
    try:
        return int(args.func(args))
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    except CacheError as error:
        print(f"sglang_dsv4 {args.command}: {error}", file=sys.stderr)
        return 1
