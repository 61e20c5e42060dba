"""``python -m sglang_dsv4 make-tiny DIR``."""

import argparse
import sys
from pathlib import Path

from sglang_dsv4.tiny.checkpoint import write_tiny_checkpoint
from sglang_dsv4.tiny.spec import SHAPES, TinySpec


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``make-tiny``."""
    default = TinySpec()
    parser = subparsers.add_parser(
        "make-tiny",
        help="write a tiny random-weight DeepSeek-V4 checkpoint",
        description="Write a tiny random-weight DeepSeek-V4 checkpoint that SGLang and transformers both load.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="made if missing; must be empty or an earlier one")
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N", help="of the weights (default: %(default)s)")
    parser.add_argument(
        "--layers",
        type=read_ratios,
        default=default.compress_ratios,
        metavar="RATIOS",
        help=f"one ratio per layer: 0 window only, 4 CSA, 128 HCA (default: {','.join(map(str, default.compress_ratios))})",
    )
    parser.add_argument(
        "--index-topk",
        type=int,
        default=default.index_topk,
        metavar="N",
        help="entries a CSA query attends to, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--shape",
        choices=tuple(SHAPES),
        default="tiny",
        help="heads64: 64 query heads, 64 index heads, as kernels on a GPU want; flash: V4-Flash's widths with few and "
        "narrow experts (1.8 GB with the default layers); both with weights for bf16 (default: %(default)s)",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint and say where; the exit status."""
    try:
        spec = TinySpec(
            seed=args.seed,
            compress_ratios=args.layers,
            index_topk=args.index_topk,
            num_hash_layers=min(TinySpec.num_hash_layers, len(args.layers)),
            **SHAPES[args.shape],
        )
        write_tiny_checkpoint(args.directory, spec)
    except (ValueError, OSError) as error:
        print(f"make-tiny: {error}", file=sys.stderr)
        return 1
    ratios = ", ".join(map(str, spec.compress_ratios))
    print(f"{args.directory}: DeepSeek-V4, layers of ratios {ratios}, seed {spec.seed}")
    return 0


def read_ratios(text: str) -> tuple[int, ...]:
    """Layers as on the command line, one ratio each."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, such as 0,4,128, got {text!r}") from None
