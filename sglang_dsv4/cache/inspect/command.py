"""``python -m sglang_dsv4 inspect DUMP``."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sglang_dsv4.cache.inspect.dump import read_dump

PAGES_SHOWN = 12


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``inspect``."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a failed integrity check left behind",
        description="Show a dump that a server with --dsv4-check wrote before it stopped: the broken invariant, the "
        "request, the page, and the values of the rows that are wrong.",
    )
    parser.add_argument("dump", type=Path, metavar="DUMP", help="the file that the log names")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print it; the exit status."""
    dump = read_dump(args.dump)
    finding = dump.finding
    console = Console()
    console.print(Text(dump.message, style="bold"))
    sequences = Table(title="Requests of the step", title_justify="left")
    for heading in ("request", "tokens", "slot", "history pages", "window pages"):
        sequences.add_column(heading)
    for number, sequence in enumerate(dump.sequences):
        mark = "> " if number == finding.owner else "  "
        sequences.add_row(
            Text(f"{mark}{sequence.name}"),
            f"{sequence.seq_len:,}",
            str(sequence.state_slot),
            _pages(sequence.history_pages),
            _pages(sequence.window_pages),
        )
    console.print(sequences)
    held = {"history page": "history_pages", "window page": "window_pages"}.get(finding.page_kind)
    sharing = [sequence.name for sequence in dump.sequences if held and finding.page in getattr(sequence, held)]
    if sharing:
        console.print(Text(f"{finding.page_kind} {finding.page} is held by {', '.join(sharing)}."))
    table = Table(title=f"Wrong rows: {finding.what}, layer {finding.layer_id}", title_justify="left")
    for heading in ("row", "finite", "least", "largest", "norm"):
        table.add_column(heading, justify="right")
    for row, value in zip(finding.rows.tolist(), finding.values, strict=True):
        finite = value[value.isfinite()]
        least, largest = (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 0.0)
        table.add_row(
            f"{row}", f"{len(finite)} of {len(value)}", f"{least:.4g}", f"{largest:.4g}", f"{finite.norm().item():.4g}"
        )
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in dump.facts.items()), markup=False)
    return 0


def _pages(pages: list[int]) -> str:
    shown = " ".join(map(str, pages[:PAGES_SHOWN]))
    return shown if len(pages) <= PAGES_SHOWN else f"{shown} ... ({len(pages)})"
