"""``python -m sglang_dsv4 prune``."""

import argparse
from pathlib import Path

from sglang_dsv4.cache.persist.prune import prune_saved


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``prune``."""
    parser = subparsers.add_parser(
        "prune",
        help="remove pages of saved sequences that no manifest names any more",
        description="Remove the pages in a folder of saved sequences that none of its manifests (the files that were saved) "
        "names any more. A load of a sequence at the same moment may find a page missing, and says so.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the saved sequences are")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Prune one folder."""
    found = prune_saved(args.folder, dry_run=args.dry_run)
    verb = "would remove" if args.dry_run else "removed"
    print(
        f"{args.folder}: {found.sequences} sequences need {found.kept_files} pages ({found.kept_bytes:,} bytes); "
        f"{verb} {found.removed_files} files ({found.removed_bytes:,} bytes)"
    )
    return 0
