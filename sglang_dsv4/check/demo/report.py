"""What the demonstration prints."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sglang_dsv4.check.demo.standards import Standard
from sglang_dsv4.check.demo.workload import Answer

_MIB = 1 << 20
_TEXT_COLUMNS = 24


def print_answers(console: Console, answers: Sequence[Answer]) -> None:
    """One row per request."""
    words = [Column(heading, no_wrap=True) for heading in ("request", "text")]
    numbers = [Column(heading, justify="right", no_wrap=True) for heading in ("prompt", "new", "cached", "s")]
    table = Table(*words, *numbers, title="Requests", title_justify="left")
    for answer in answers:
        counts = (len(answer.request.prompt_ids), len(answer.reply.token_ids), answer.reply.cached_tokens)
        table.add_row(answer.name, Text(printable(answer.reply.text)), *map(str, counts), f"{answer.seconds:.2f}")
    console.print(table)


def printable(text: str) -> str:
    """``text`` on one line, without anything a terminal might obey."""
    shown = "".join(character if character.isprintable() else "·" for character in text)
    return shown if len(shown) <= _TEXT_COLUMNS else shown[: _TEXT_COLUMNS - 1] + "…"


def print_memory(console: Console, facts: dict[str, Any]) -> None:
    """The cache's report of its own bytes."""
    report = facts["report"]
    console.print(f"[italic]Memory ({report['row_format']} rows, {report['index_format']} index keys)")
    table = Table("pool", Column("MiB", justify="right"))
    for name, size in report["bytes_by_pool"].items():
        table.add_row(name.replace("_", " "), f"{size / _MIB:.2f}")
    table.add_section()
    table.add_row("total", f"{report['total_bytes'] / _MIB:.2f}")
    console.print(table)
    console.print(
        f"A token of context costs {report['history_bytes_per_token']:.1f} bytes of entries and index keys; "
        f"a request {report['stream_bytes_per_request']:,} bytes of stream state, whatever its length."
    )


def print_verdict(console: Console, standards: Sequence[Standard], faults: Sequence[str]) -> None:
    """Measured errors beside their bounds and controls (planted faults that must exceed the bound), then everything wrong."""
    console.print("Against transformers, full forward, fp32 (differences of log-probabilities):")
    for standard in standards:
        console.print(f"  {standard.name}: largest {standard.largest:.2e}, allowed {standard.bound:.2e}")
        console.print(f"    control, {standard.control_error:.2e}: {standard.control_name}")
    for fault in faults:
        console.print(Text(f"WRONG  {fault}", style="bold red"))
    if faults:
        console.print(Text("FAILED", style="bold red"))
    else:
        num_tokens = sum(len(answer.reply.token_ids) for answer, _ in standards[0].comparisons)
        console.print(Text(f"RIGHT  all {num_tokens} generated tokens; prefix hits where they must occur", style="bold green"))
